//! Symmetric monomials: the feature map of the polynomial engine.
//!
//! The features of `x` are all products `x^α` of total degree 0 to `g`, `r = C(d+g, g)` of them, since
//!
//! ```text
//! (q.k)^j = sum_{|α|=j} (j!/α!) q^α k^α
//! ```
//!
//! They form a tree: each monomial of degree `j` is its parent of degree `j - 1` times one variable that does not come
//! before the parent's last one. Walking down the tree builds the features with one multiplication each; walking up it,
//! the chain rule `u_parent += u_child x_var`, `dx_var += u_child x^parent` turns a gradient of the features into one
//! of `x`.

use std::ops::Range;

use crate::real::{Real, vectorised};

/// The tree of the monomials of `d` variables up to some degree, in order of degree.
#[derive(Debug, Clone)]
pub(crate) struct Monomials {
    /// `(parent, variable)` of each monomial but the constant one.
    links: Vec<(u32, u32)>,
    /// `j!/α!`.
    multinomials: Vec<f64>,
    /// Number of monomials of degree at most `j`.
    ranks: Vec<usize>,
}

/// Features of the highest degree that are formed at a time: enough for a fast product, few enough to stay in the
/// cache.
pub(crate) const PIECE: usize = 128;
/// Beyond this not even one variable makes sense.
const LARGEST_DEGREE: usize = 1 << 20;

/// `C(d + g, g)`, or `None` where it does not fit.
pub(crate) fn rank(d: usize, degree: usize) -> Option<usize> {
    if degree > LARGEST_DEGREE {
        return None;
    }
    let mut r: u128 = 1;
    for j in 1..=degree as u128 {
        r = r.checked_mul(d as u128 + j)? / j;
        u32::try_from(r).ok()?;
    }
    Some(r as usize)
}

impl Monomials {
    /// The tree up to `degree`; [`rank`] says first whether it fits.
    pub fn new(d: usize, degree: usize) -> Self {
        let mut links = vec![(0, 0)];
        let mut multinomials = vec![1.0];
        // How often the last variable stands in the monomial.
        let mut repeats = vec![0u32];
        let mut ranks = vec![1];
        let mut previous = 0..1;
        for j in 1..=degree {
            for parent in previous.clone() {
                let last = links[parent].1;
                for variable in last..d as u32 {
                    let run = if variable == last { repeats[parent] + 1 } else { 1 };
                    links.push((parent as u32, variable));
                    multinomials.push(multinomials[parent] * j as f64 / f64::from(run));
                    repeats.push(run);
                }
            }
            previous = previous.end..links.len();
            ranks.push(links.len());
        }
        Self { links, multinomials, ranks }
    }

    /// Number of monomials of degree at most `degree`.
    pub fn rank(&self, degree: usize) -> usize {
        self.ranks[degree]
    }

    /// What multiplies `q^α k^α` in `sum_j coefficients_j (scale q.k)^j`, for every `α`.
    pub fn weights(&self, coefficients: &[f64], scale: f64) -> Vec<f64> {
        let mut weights = Vec::with_capacity(self.ranks[coefficients.len() - 1]);
        for (j, a) in coefficients.iter().enumerate() {
            let factor = a * scale.powi(j as i32);
            let of_degree = weights.len()..self.ranks[j];
            weights.extend(self.multinomials[of_degree].iter().map(|m| m * factor));
        }
        weights
    }

    /// The features of degree at most `degree` in pieces of consecutive ones: those below that degree, then the others,
    /// [`PIECE`] at a time.
    pub fn pieces(&self, degree: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (low, r) = (self.ranks[degree - 1], self.ranks[degree]);
        std::iter::once(0..low).chain((low..r).step_by(PIECE).map(move |start| start..(start + PIECE).min(r)))
    }

    /// Writes the first `r` features of a tile: `x` is `(d, len)`, `f` `(r, len)`.
    pub fn features<T: Real>(&self, x: &[T], len: usize, r: usize, f: &mut [T]) {
        f[..len].fill(T::ONE);
        vectorised(
            #[inline(always)]
            || {
                for (a, &link) in self.links[..r].iter().enumerate().skip(1) {
                    let (done, rest) = f.split_at_mut(a * len);
                    child(link, x, done, len, &mut rest[..len]);
                }
            },
        );
    }

    /// Writes a piece of the features of the highest degree, from all those below that degree.
    pub fn piece<T: Real>(&self, x: &[T], low: &[T], len: usize, piece: Range<usize>, f: &mut [T]) {
        vectorised(
            #[inline(always)]
            || {
                for (&link, f) in self.links[piece].iter().zip(f.chunks_exact_mut(len)) {
                    child(link, x, low, len, f);
                }
            },
        );
    }

    /// Adds to `dx`, `(d, len)`, and to the gradient `dlow` of the features below the highest degree what a piece of
    /// that degree with the gradient `df` gives them.
    pub fn pullback_piece<T: Real>(
        &self,
        x: &[T],
        low: &[T],
        len: usize,
        piece: Range<usize>,
        df: &[T],
        dlow: &mut [T],
        dx: &mut [T],
    ) {
        vectorised(
            #[inline(always)]
            || {
                for (&link, df) in self.links[piece].iter().zip(df.chunks_exact(len)) {
                    pull(link, x, low, len, df, dlow, dx);
                }
            },
        );
    }

    /// Adds `J^T df` to `dx`, `(d, len)`, for the gradient `df` of the first `r` features, which it destroys. Of `f`
    /// only the features of less than the highest degree are read.
    pub fn pullback<T: Real>(&self, x: &[T], f: &[T], len: usize, r: usize, df: &mut [T], dx: &mut [T]) {
        vectorised(
            #[inline(always)]
            || {
                for (a, &link) in self.links[..r].iter().enumerate().skip(1).rev() {
                    let (before, rest) = df.split_at_mut(a * len);
                    pull(link, x, f, len, &rest[..len], before, dx);
                }
            },
        );
    }
}

/// `f = f_parent x_variable`.
#[inline(always)]
fn child<T: Real>((parent, variable): (u32, u32), x: &[T], parents: &[T], len: usize, f: &mut [T]) {
    let parent = &parents[parent as usize * len..][..len];
    let x = &x[variable as usize * len..][..len];
    for ((f, &p), &x) in f.iter_mut().zip(parent).zip(x) {
        *f = p * x;
    }
}

/// `df_parent += df x_variable`, `dx_variable += df f_parent`.
#[inline(always)]
fn pull<T: Real>(
    (parent, variable): (u32, u32),
    x: &[T],
    parents: &[T],
    len: usize,
    df: &[T],
    dparents: &mut [T],
    dx: &mut [T],
) {
    let dparent = &mut dparents[parent as usize * len..][..len];
    let parent = &parents[parent as usize * len..][..len];
    let x = &x[variable as usize * len..][..len];
    let dx = &mut dx[variable as usize * len..][..len];
    for t in 0..len {
        dparent[t] += df[t] * x[t];
        dx[t] += df[t] * parent[t];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_binomials() {
        assert_eq!(rank(16, 2), Some(153));
        assert_eq!(rank(16, 4), Some(4845));
        assert_eq!(rank(64, 2), Some(2145));
        assert_eq!(rank(64, 20), None);
        assert_eq!(Monomials::new(16, 4).rank(4), 4845);
        assert_eq!(Monomials::new(1, 3).rank(3), 4);
    }

    #[test]
    fn weighted_features_sum_to_the_polynomial_of_the_inner_product() {
        let (d, len, scale) = (5, 3, 0.7);
        let coefficients = [0.3, -1.0, 0.5, 0.25, 2.0];
        let tree = Monomials::new(d, 4);
        let r = tree.rank(4);
        let number = |i: usize| ((i * 37 % 19) as f64 - 9.0) / 7.0;
        let q: Vec<f64> = (0..d * len).map(number).collect();
        let k: Vec<f64> = (0..d * len).map(|i| number(i + 5)).collect();
        let (mut fq, mut fk) = (vec![f64::NAN; r * len], vec![f64::NAN; r * len]);
        tree.features(&q, len, r, &mut fq);
        tree.features(&k, len, r, &mut fk);
        let weights = tree.weights(&coefficients, scale);
        for t in 0..len {
            let s: f64 = scale * (0..d).map(|c| q[c * len + t] * k[c * len + t]).sum::<f64>();
            let expected: f64 = coefficients.iter().enumerate().map(|(j, a)| a * s.powi(j as i32)).sum();
            let got: f64 = (0..r).map(|a| weights[a] * fq[a * len + t] * fk[a * len + t]).sum();
            assert!((got - expected).abs() <= 1e-12 * expected.abs().max(1.0), "{got} {expected}");
        }
    }

    #[test]
    fn pullback_matches_central_differences() {
        let (d, degree) = (4, 3);
        let tree = Monomials::new(d, degree);
        let r = tree.rank(degree);
        let x: Vec<f64> = vec![0.3, -0.8, 1.1, 0.5];
        let u: Vec<f64> = (0..r).map(|a| ((a * 7 % 11) as f64 - 5.0) / 3.0).collect();
        let value = |x: &[f64]| -> f64 {
            let mut f = vec![0.0; r];
            tree.features(x, 1, r, &mut f);
            f.iter().zip(&u).map(|(f, u)| f * u).sum()
        };
        let mut f = vec![0.0; r];
        tree.features(&x, 1, r, &mut f);
        let mut dx = vec![0.0; d];
        tree.pullback(&x, &f, 1, r, &mut u.clone(), &mut dx);
        let low = tree.rank(degree - 1);
        let (mut by_pieces, mut dlow) = (vec![0.0; d], u[..low].to_vec());
        for piece in tree.pieces(degree).skip(1) {
            let mut top = vec![f64::NAN; piece.len()];
            tree.piece(&x, &f[..low], 1, piece.clone(), &mut top);
            assert_eq!(top, f[piece.clone()]);
            tree.pullback_piece(&x, &f[..low], 1, piece.clone(), &u[piece], &mut dlow, &mut by_pieces);
        }
        tree.pullback(&x, &f[..low], 1, low, &mut dlow, &mut by_pieces);
        for (a, b) in by_pieces.iter().zip(&dx) {
            assert!((a - b).abs() <= 1e-13 * b.abs().max(1.0), "{a} {b}");
        }
        for c in 0..d {
            let h = 1e-5;
            let (mut up, mut down) = (x.clone(), x.clone());
            up[c] += h;
            down[c] -= h;
            let expected = (value(&up) - value(&down)) / (2.0 * h);
            assert!((dx[c] - expected).abs() <= 1e-8 * expected.abs().max(1.0), "{} {expected}", dx[c]);
        }
    }
}
