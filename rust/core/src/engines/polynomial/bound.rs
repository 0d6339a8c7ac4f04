//! How far a polynomial is from the exponential at the most, and what that makes of attention.

use faer::MatRef;

use super::Form;
use crate::numerics::real::Real;
use crate::problem::heads::Head;

/// The length of the longest of some rows, less their shift, which may be empty.
pub(crate) fn longest_row<T: Real>(x: MatRef<'_, T>, rows: impl Iterator<Item = usize>, shift: &[T]) -> f64 {
    let shift = |c: usize| shift.get(c).map_or(0.0, |shift| shift.to_f64());
    rows.map(|i| x.row(i).iter().enumerate().map(|(c, x)| (x.to_f64() - shift(c)).powi(2)).sum::<f64>())
        .fold(0.0, f64::max)
        .sqrt()
}

/// Roots are found in a time that grows with the cube of the degree; those of higher ones are not looked for.
const MOST_COEFFICIENTS: usize = 65;

/// The largest relative error of `p` on `[-r, r]`, `max |p(s) e^-s - 1|`: at the ends, or where `p' = p`. Infinite, as
/// nothing is known, for degrees above 64.
pub(crate) fn largest_relative_error(a: &[f64], r: f64) -> f64 {
    if a.len() > MOST_COEFFICIENTS {
        return f64::INFINITY;
    }
    let p = |s: f64| a.iter().rev().fold(0.0, |p, a| p * s + a);
    let difference: Vec<f64> =
        (0..a.len()).map(|l| a.get(l + 1).map_or(0.0, |next| (l + 1) as f64 * next) - a[l]).collect();
    let mut points = roots(&difference, r);
    points.extend([-r, r]);
    points
        .into_iter()
        .map(|s| (p(s) * (-s).exp() - 1.0).abs())
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

/// The roots of a polynomial in `[-r, r]`: between those of its derivative it is monotone.
fn roots(a: &[f64], r: f64) -> Vec<f64> {
    if a.len() <= 1 {
        return Vec::new();
    }
    let p = |s: f64| a.iter().rev().fold(0.0, |p, a| p * s + a);
    let derivative: Vec<f64> = a.iter().enumerate().skip(1).map(|(l, a)| l as f64 * a).collect();
    let turns = roots(&derivative, r);
    let ends: Vec<f64> = std::iter::once(-r).chain(turns).chain([r]).collect();
    let mut found = Vec::new();
    for pair in ends.windows(2) {
        let (mut low, mut high) = (pair[0], pair[1]);
        if p(low).signum() == p(high).signum() {
            // No crossing; a double root lies at a turn, which is as good a point to look at.
            found.push(low);
            continue;
        }
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if p(middle).signum() == p(low).signum() { low = middle } else { high = middle }
        }
        found.push(low);
    }
    found
}

/// The a-priori bound of the relative Frobenius error of `out`, before rounding: with `eps = max |p(s) e^-s - 1|` over the scores that
/// norms allow, `|out - exact| <= 2 eps / (1 - eps) max|v|` entrywise. `None` where it says nothing.
pub(super) fn error_bound<T: Real>(head: &Head<'_, T>, form: &Form<T>, out: &[T]) -> Option<f64> {
    let longest_query = longest_row(head.q, 0..head.n(), &form.shifts.query);
    // Also those of a bias like -1e9, which rows may see that see no others.
    let keys = || (0..head.m()).filter(|&j| !head.removed(j));
    let longest_key = longest_row(head.k, keys(), &form.shifts.key);
    let eps = largest_relative_error(&form.coefficients, head.scores.scale.abs() * longest_query * longest_key);
    let largest = keys().flat_map(|j| head.v.row(j).iter()).map(|v| v.to_f64().abs()).fold(0.0, f64::max);
    let absolute = 2.0 * eps / (1.0 - eps) * largest * (out.len() as f64).sqrt();
    let size = out.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt();
    (eps < 1.0 && absolute < size).then(|| absolute / (size - absolute))
}
