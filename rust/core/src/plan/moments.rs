//! Moments of the scores of drawn queries: from them follow the rows of out and dq by any polynomial, which need not run.
//!
//! For a drawn query `i`, with the shifted scores `s'_ij` and the weights `w_j` of keys, the moments of the far keys are
//!
//! ```text
//! U_l = sum_j w_j s'_ij^l [1, v_j, k'_j]        V_l = sum_j w_j s'_ij^l (dout_i.v_j) k'_j
//! ```
//!
//! Numerators and denominators by a polynomial `p(s) = sum_l a_l s^l` are `sum_l a_l U_l`, and its dq is made of `U` and `V`
//! in the same way. The same sums under exact weights are added for the near keys, and give the exact rows to compare with.

use std::ops::Range;

use faer::Mat;
use rayon::prelude::*;

use crate::context::Context;
use crate::engines::polynomial::{Form, longest_row};
use crate::error::{Result, expect_len};
use crate::linear::nearby::NearKeys;
use crate::linear::shifts::{Biases, Relative, Shifts, biases};
use crate::measure::exact_rows::{gather, widened_keys};
use crate::measure::key_gradients::Weights;
use crate::memory::{collected, matrix, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{TILE, add_product, product, tiles, view, view_mut};
use crate::problem::heads::Head;

/// Beyond this bound of the scores no polynomial is considered: squares of their exponentials would overflow.
pub const LARGEST_BOUND: f64 = 300.0;

/// Keys that one task goes through.
const KEYS_A_TASK: usize = 16 * TILE;

/// What errors call them.
const MOMENTS: &str = "moments of rows";

/// Sums over the keys of some queries. Each matrix has a column for each query, and the rows `[1, v, k', (dout.v) k']`, the
/// last two where a gradient is given: `(1 + d_v + 2 d, queries)`.
#[derive(Debug, Clone)]
pub struct Moments {
    d: usize,
    d_v: usize,
    scale: f64,
    dout: Option<Mat<f64>>,
    /// Under the exact weights of near keys, and of far ones.
    near: Mat<f64>,
    far_exact: Mat<f64>,
    /// Under the powers of the scores of far keys, from 0 on.
    powers: Vec<Mat<f64>>,
}

/// The rows of out, `(rows, d_v)`, and of dq, `(rows, d)`, where a gradient is given.
type Rows = (Mat<f64>, Option<Mat<f64>>);

impl Moments {
    /// The moments of drawn rows of a head, up to the power `degree`. `None` where scores are so large that sums may
    /// overflow. Time `O(rows m (d + d_v) degree)`, in float64.
    pub(crate) fn new<T: Real>(
        ctx: &Context,
        head: &Head<'_, T>,
        rows: &[usize],
        shifts: &Shifts<T>,
        near: NearKeys,
        degree: usize,
        dout: Option<&Mat<f64>>,
    ) -> Result<Option<Self>> {
        let Some(drawn) = Drawn::new(head, rows, shifts, near, dout)? else { return Ok(None) };
        let (kinds, len) = (degree + 3, drawn.width() * rows.len());
        let end = head.mask.seen_by(0..rows.last().map_or(0, |row| row + 1), head.m()).end;
        let parts = (0..end.div_ceil(KEYS_A_TASK))
            .into_par_iter()
            .map(|task| {
                let mut sums = zeroed(kinds * len, MOMENTS)?;
                let mut tile = TileOfKeys::new(rows.len())?;
                for (start, count) in tiles(task * KEYS_A_TASK..end.min((task + 1) * KEYS_A_TASK), TILE) {
                    ctx.check()?;
                    tile.load(&drawn, start..start + count);
                    tile.add_to(&drawn, &mut sums, len);
                }
                Ok(sums)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut sums = zeroed::<f64>(kinds * len, MOMENTS)?;
        for part in parts {
            sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
        let factor = drawn.bound.exp();
        sums[..2 * len].iter_mut().for_each(|sum| *sum *= factor);
        let count = rows.len();
        let entry = |kind: usize, row: usize, query: usize| sums[kind * len + row * count + query];
        Self::from_sums([head.d(), head.d_v(), count, kinds], head.scores.scale, dout.cloned(), entry).map(Some)
    }

    /// The moments whose sums are `entry(kind, row, query)`. The kinds are the sums under the exact weights of near keys,
    /// those under the exact weights of far keys, and those under the powers from 0 on; rows are as in [`Moments`]. An error
    /// where `dout` is not `(count, d_v)`.
    pub fn from_sums(
        [d, d_v, count, kinds]: [usize; 4],
        scale: f64,
        dout: Option<Mat<f64>>,
        entry: impl Fn(usize, usize, usize) -> f64,
    ) -> Result<Self> {
        if let Some(dout) = &dout {
            expect_len("dout", dout.nrows() * dout.ncols(), count * d_v)?;
        }
        let width = 1 + d_v + if dout.is_some() { 2 * d } else { 0 };
        let sums = |kind: usize| matrix(width, count, MOMENTS, |row, query| entry(kind, row, query));
        let powers = (2..kinds).map(sums).collect::<Result<_>>()?;
        Ok(Self { d, d_v, scale, dout, near: sums(0)?, far_exact: sums(1)?, powers })
    }

    /// The gradient that was given.
    pub fn dout(&self) -> Option<&Mat<f64>> {
        self.dout.as_ref()
    }

    /// The exact rows.
    pub fn exact(&self) -> Rows {
        let sums = &self.near + &self.far_exact;
        self.rows(&sums, &sums)
    }

    /// The rows by the polynomial with the coefficients `a` for far keys, and exactly for near ones; `None` where a
    /// denominator is not positive.
    pub fn polynomial(&self, a: &[f64], consistent: bool) -> Option<Rows> {
        let sums = self.combine(a);
        if (0..sums.ncols()).any(|i| sums[(0, i)] <= 0.0 || sums[(0, i)].is_nan()) {
            return None;
        }
        let slope: Vec<f64> = a.iter().enumerate().skip(1).map(|(l, a)| l as f64 * a).collect();
        let slopes = if consistent { self.combine(&slope) } else { sums.clone() };
        Some(self.rows(&sums, &slopes))
    }

    /// The sums under exact weights of near keys, and under a polynomial of the scores of far ones.
    fn combine(&self, a: &[f64]) -> Mat<f64> {
        let mut sums = self.near.clone();
        for (a, power) in a.iter().zip(&self.powers) {
            sums += faer::Scale(*a) * power;
        }
        sums
    }

    /// Rows of out from sums under weights, and of dq from sums under the weights' slopes:
    /// `dq_i = (c / D_i) sum_j slope_ij (dout_i.v_j - delta_i) k'_j`.
    fn rows(&self, sums: &Mat<f64>, slopes: &Mat<f64>) -> Rows {
        let (d_v, d, count) = (self.d_v, self.d, sums.ncols());
        let out = Mat::from_fn(count, d_v, |i, c| sums[(1 + c, i)] / sums[(0, i)]);
        let dq = self.dout.as_ref().map(|dout| {
            Mat::from_fn(count, d, |i, c| {
                let delta: f64 = (0..d_v).map(|c| dout[(i, c)] * out[(i, c)]).sum();
                self.scale * (slopes[(1 + d_v + d + c, i)] - delta * slopes[(1 + d_v + c, i)]) / sums[(0, i)]
            })
        });
        (out, dq)
    }
}

/// Drawn queries of a head, and what their moments are made of.
struct Drawn<'a, T> {
    head: &'a Head<'a, T>,
    shifts: &'a Shifts<T>,
    rows: &'a [usize],
    /// The queries less their shift, `(rows, d)`.
    q: Mat<f64>,
    /// The first near key of each query.
    near_starts: Vec<usize>,
    /// The weights of keys, of which the largest is 1; `None` where all are.
    weights: Option<Vec<f64>>,
    /// No shifted score is larger.
    bound: f64,
    dout: Option<&'a Mat<f64>>,
}

impl<'a, T: Real> Drawn<'a, T> {
    fn new(
        head: &'a Head<'a, T>,
        rows: &'a [usize],
        shifts: &'a Shifts<T>,
        near: NearKeys,
        dout: Option<&'a Mat<f64>>,
    ) -> Result<Option<Self>> {
        // Less the largest, whatever the mask: rows that see only much smaller ones have sums of 0, which no polynomial fits.
        let weights = match biases(head, Relative::ToLargest, shifts, 0.0)? {
            None => None,
            Some(Biases { of_keys, .. }) => {
                let level = of_keys.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                Some(collected(of_keys.iter().map(|b| (b - level).exp()), "weights of keys")?)
            }
        };
        let mut q = gather(head.q, rows)?;
        for i in 0..rows.len() {
            q.row_mut(i).iter_mut().zip(&shifts.query).for_each(|(q, shift)| *q -= shift.to_f64());
        }
        let longest = (0..rows.len()).map(|i| q.row(i).iter().map(|x| x * x).sum::<f64>().sqrt()).fold(0.0, f64::max);
        let has_weight = |&j: &usize| weights.as_ref().is_none_or(|w| w[j] > 0.0);
        let bound =
            head.scores.scale.abs() * longest * longest_row(head.k, (0..head.m()).filter(has_weight), &shifts.key);
        if bound > LARGEST_BOUND || bound.is_nan() {
            return Ok(None);
        }
        let causal = !head.mask.is_none();
        let near_start = |&i: &usize| if causal { near.start_of_query(i) } else { usize::MAX };
        let near_starts = rows.iter().map(near_start).collect();
        Ok(Some(Self { head, shifts, rows, q, near_starts, weights, bound, dout }))
    }

    /// Width of `[1, v, k']`, the last where a gradient is given.
    fn e(&self) -> usize {
        1 + self.head.d_v() + if self.dout.is_some() { self.head.d() } else { 0 }
    }

    /// Numbers that are summed for a query.
    fn width(&self) -> usize {
        self.e() + if self.dout.is_some() { self.head.d() } else { 0 }
    }

    fn weight(&self, j: usize) -> f64 {
        self.weights.as_ref().map_or(1.0, |w| w[j])
    }
}

/// A tile of keys, and what the drawn queries make of it: tiles of pairs are `(keys, queries)`.
struct TileOfKeys {
    queries: usize,
    keys: usize,
    /// The keys less their shift, `(keys, d)`.
    k: Vec<f64>,
    /// `[1, v, k']`, `(keys, e)`.
    values: Vec<f64>,
    /// Shifted scores.
    scores: Vec<f64>,
    /// `dout_i.v_j`.
    upstream: Vec<f64>,
    /// Exact weights of near keys, 0 of the others. Of use where `has_near`.
    near: Vec<f64>,
    has_near: bool,
    /// Exact weights of far keys, 0 of the others.
    far_exact: Vec<f64>,
    /// A power of the scores of far keys, times their weights.
    power: Vec<f64>,
    /// Room for weights times `dout_i.v_j`.
    weighted: Vec<f64>,
}

impl TileOfKeys {
    fn new(queries: usize) -> Result<Self> {
        let tile = || zeroed(TILE * queries, "a tile of moments");
        Ok(Self {
            queries,
            keys: 0,
            k: Vec::new(),
            values: Vec::new(),
            scores: tile()?,
            upstream: tile()?,
            near: tile()?,
            has_near: false,
            far_exact: tile()?,
            power: tile()?,
            weighted: tile()?,
        })
    }

    /// Loads some keys, and fills the tiles of pairs: the power is the 0th.
    fn load<T: Real>(&mut self, drawn: &Drawn<'_, T>, keys: Range<usize>) {
        self.load_keys(drawn, keys.clone());
        self.weigh(drawn, keys.start);
        let causal = !drawn.head.mask.is_none();
        self.has_near = causal && drawn.near_starts.iter().any(|&start| start < keys.end);
        if self.has_near {
            self.separate_near(drawn, keys);
        }
    }

    /// Fills `k` and `values`, in float64.
    fn load_keys<T: Real>(&mut self, drawn: &Drawn<'_, T>, keys: Range<usize>) {
        let head = drawn.head;
        let (d, d_v, e) = (head.d(), head.d_v(), drawn.e());
        self.keys = keys.len();
        self.k = widened_keys(head, head.k, keys.clone());
        let v = widened_keys(head, head.v, keys);
        for k in self.k.chunks_exact_mut(d) {
            k.iter_mut().zip(&drawn.shifts.key).for_each(|(k, shift)| *k -= shift.to_f64());
        }
        self.values = vec![1.0; self.keys * e];
        for (t, values) in self.values.chunks_exact_mut(e).enumerate() {
            values[1..=d_v].copy_from_slice(&v[t * d_v..(t + 1) * d_v]);
            if drawn.dout.is_some() {
                values[1 + d_v..].copy_from_slice(&self.k[t * d..(t + 1) * d]);
            }
        }
    }

    /// Fills the tiles of pairs, as if all keys were far, for the keys from `first` on.
    fn weigh<T: Real>(&mut self, drawn: &Drawn<'_, T>, first: usize) {
        let head = drawn.head;
        let (d, d_v, e, bk, count) = (head.d(), head.d_v(), drawn.e(), self.keys, self.queries);
        let scale = head.scores.scale;
        product(view_mut(&mut self.scores, bk, count), view(&self.k, bk, d), drawn.q.transpose(), scale);
        if let Some(dout) = drawn.dout {
            let v = view(&self.values, bk, e).subcols(1, d_v);
            product(view_mut(&mut self.upstream, bk, count), v, dout.transpose(), 1.0);
        }
        let (scores, exact, power) = (&mut self.scores, &mut self.far_exact, &mut self.power);
        vectorised(
            #[inline(always)]
            || {
                for j in 0..bk {
                    let (w, row) = (drawn.weight(first + j), j * count..(j + 1) * count);
                    if w == 0.0 {
                        // Whatever a removed key holds.
                        scores[row.clone()].fill(0.0);
                    }
                    for i in row {
                        exact[i] = w * (scores[i] - drawn.bound).exp_nonpositive();
                        power[i] = w;
                    }
                }
            },
        );
    }

    /// Moves the weights of near keys out of those of far ones, and clears those that are not seen.
    fn separate_near<T: Real>(&mut self, drawn: &Drawn<'_, T>, keys: Range<usize>) {
        for (j, key) in keys.enumerate() {
            for (i, (&row, &near_start)) in drawn.rows.iter().zip(&drawn.near_starts).enumerate() {
                let at = j * self.queries + i;
                let (seen, far) = (drawn.head.mask.sees(row, key, drawn.head.m()), key < near_start);
                self.near[at] = if seen && !far { self.far_exact[at] } else { 0.0 };
                if !(seen && far) {
                    (self.far_exact[at], self.power[at]) = (0.0, 0.0);
                }
            }
        }
    }

    /// Adds the tile's sums, of each kind `len` numbers, in the order of [`Moments::from_sums`]. Exact weights are relative to
    /// `e^bound`.
    fn add_to<T: Real>(&mut self, drawn: &Drawn<'_, T>, sums: &mut [f64], len: usize) {
        let Self { queries, keys, k, values, scores, upstream, near, far_exact, power, weighted, .. } = self;
        let (d, e, bk, count) = (drawn.head.d(), drawn.e(), *keys, *queries);
        let (k, values) = (view(k, bk, d).transpose(), view(values, bk, e).transpose());
        let mut add = |weights: &[f64], sums: &mut [f64]| {
            let (plain, scored) = sums.split_at_mut(e * count);
            add_product(view_mut(plain, e, count), values, view(weights, bk, count), 1.0);
            if drawn.dout.is_some() {
                let pairs = weights.iter().zip(&*upstream);
                weighted[..bk * count].iter_mut().zip(pairs).for_each(|(x, (w, up))| *x = w.times(*up));
                add_product(view_mut(scored, d, count), k, view(weighted, bk, count), 1.0);
            }
        };
        let (near_sums, far_sums) = sums.split_at_mut(len);
        let (exact_sums, power_sums) = far_sums.split_at_mut(len);
        if self.has_near {
            add(near, near_sums);
        }
        add(far_exact, exact_sums);
        for (l, sums) in power_sums.chunks_exact_mut(len).enumerate() {
            if l > 0 {
                power[..bk * count].iter_mut().zip(&*scores).for_each(|(power, s)| *power *= s);
            }
            add(power, sums);
        }
    }
}

/// The weights `f_ij` by a polynomial, pair by pair, where the logarithms of row sums are `log_sums`.
pub(crate) struct PolynomialWeights<'a, T> {
    pub head: &'a Head<'a, T>,
    pub form: &'a Form<T>,
    pub log_sums: &'a [f64],
}

impl<T: Real> Weights for PolynomialWeights<'_, T> {
    fn weigh(&self, i: usize, keys: &[usize], scores: &mut [f64], f: &mut [f64]) {
        let Form { coefficients, shifts, near, consistent } = self.form;
        let (head, scale) = (self.head, self.head.scores.scale);
        let dot = |x: faer::RowRef<'_, T>, y: &[T]| {
            scale * x.iter().zip(y).map(|(x, y)| x.to_f64() * y.to_f64()).sum::<f64>()
        };
        let near_start = if head.mask.is_none() { usize::MAX } else { near.start_of_query(i) };
        let seen = head.seen(i);
        let row_constant = dot(head.q.row(i), &shifts.key); // c q_i.β
        for ((&j, score), f) in keys.iter().zip(scores).zip(f) {
            if j >= near_start || !seen.contains(&j) || head.removed(j) {
                *score = *f;
                continue;
            }
            // c α.k'_j
            let along = dot(head.k.row(j), &shifts.query)
                - scale * shifts.query.iter().zip(&shifts.key).map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>();
            let s = *score - row_constant - along;
            let w = (head.bias(j) + along + row_constant - self.log_sums[i]).exp();
            let (mut p, mut slope) = (0.0, 0.0);
            for a in coefficients.iter().rev() {
                slope = slope * s + p;
                p = p * s + a;
            }
            *f = w.times(p);
            *score = w.times(if *consistent { slope } else { p });
        }
    }
}
