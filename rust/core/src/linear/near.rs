//! Near keys: those that a query of a causal head meets one by one, and not through a state.

use std::ops::Range;

use faer::MatRef;

use super::levels::FarLevel;
use super::nearby::NearWeights;
use super::pass::Pass;
use crate::error::Result;
use crate::memory::zeroed;
use crate::numerics::real::{Real, vectorised};
use crate::numerics::softmax::exponentials;
use crate::numerics::tile::{add_product, load_transposed, product, view, view_mut};
use crate::problem::grads::{HeadGrads, Upstream};
use crate::problem::scores::add_bias;

/// Queries that meet their near keys at a time: few, so that little is computed behind the mask, and so that their
/// scores stay in the first-level cache.
pub(crate) const NEAR_TILE: usize = 32;

/// Where a row's maximum comes from: found among the near scores and the levels of the far keys, or known from the
/// forward pass (with the row's scale).
pub(crate) enum Row<'a, 'b, T> {
    Find { max: &'a mut [T], far: Option<&'a [FarLevel]> },
    Known(&'a Upstream<'b, T>),
}

/// The near keys' part of one block of queries. Tiles are `(keys, queries)`.
pub(crate) struct Near<T> {
    /// Queries, then gradients of outputs, each `(width, queries)`.
    columns: Vec<T>,
    /// Weights `e^{-M_i} A_ij`, or (row known) `f_ij`.
    f: Vec<T>,
    /// The factor of `e_ij` in the score's gradient where it is not `f`: the derivative of a consistent polynomial.
    slope: Vec<T>,
    /// `dout_i.v_j`, then the gradient of the score.
    ds: Vec<T>,
    /// Sums over the keys of weights, where the rows' maxima were found.
    sums: [T; NEAR_TILE],
    /// Numerators and denominators, `(e, queries)`.
    pub out: Vec<T>,
}

impl<T: Real> Near<T> {
    /// For up to so many near keys.
    pub fn new(pass: &Pass<'_, T>, keys: usize) -> Result<Self> {
        let tile = || zeroed(keys * NEAR_TILE, "a tile of near keys");
        let columns = pass.tokens.head.d().max(pass.tokens.e()) * NEAR_TILE;
        let slope = if Self::has_slope(pass) { tile()? } else { Vec::new() };
        Ok(Self {
            columns: zeroed(columns, "a tile of queries")?,
            f: tile()?,
            slope,
            ds: tile()?,
            sums: [T::ZERO; NEAR_TILE],
            out: zeroed(pass.tokens.e() * NEAR_TILE, "a tile of outputs")?,
        })
    }

    /// Whether a score's gradient has another factor than its weight.
    fn has_slope(pass: &Pass<'_, T>) -> bool {
        matches!(pass.near.weights, NearWeights::Polynomial { consistent: true, .. })
    }

    pub fn load_queries(&mut self, pass: &Pass<'_, T>, queries: Range<usize>) {
        load_transposed(pass.tokens.head.q, queries.start, queries.len(), &[], &mut self.columns);
    }

    /// Fills `f` (and `slope`, where it differs).
    pub fn weigh(&mut self, pass: &Pass<'_, T>, queries: Range<usize>, keys: Range<usize>, row: Row<'_, '_, T>) {
        let (bq, bk) = (queries.len(), keys.len());
        let head = pass.tokens.head;
        let q = view(&self.columns, head.d(), bq);
        product(view_mut(&mut self.f, bk, bq), head.k.subrows(keys.start, bk), q, T::of(head.scores.scale));
        match pass.near.weights {
            NearWeights::Exponential => self.weigh_exactly(pass, queries, keys, row),
            NearWeights::Polynomial { coefficients, .. } => {
                self.weigh_by_polynomial(pass, coefficients, queries, keys, row);
            }
        }
    }

    /// Numerators and denominators of the near keys.
    pub fn sum(&mut self, pass: &Pass<'_, T>, keys: Range<usize>, bq: usize) {
        let d_v = pass.tokens.head.d_v();
        let v = pass.tokens.head.v.subrows(keys.start, keys.len()).transpose();
        product(view_mut(&mut self.out, d_v, bq), v, view(&self.f, keys.len(), bq), T::ONE);
        self.out[d_v * bq..(d_v + 1) * bq].copy_from_slice(&self.sums[..bq]);
    }

    /// Adds the numerators and denominators `far` of the far keys, `(e, queries)`, each query's times its factor.
    pub fn add_far(&mut self, far: MatRef<'_, T>, factor: impl Fn(usize) -> T) {
        let mut factors = [T::ZERO; NEAR_TILE];
        factors.iter_mut().enumerate().take(far.ncols()).for_each(|(t, to)| *to = factor(t));
        for (out, far) in self.out.chunks_exact_mut(far.ncols()).zip(far.row_iter()) {
            for ((out, &far), &factor) in out.iter_mut().zip(far.iter()).zip(&factors) {
                *out += far * factor;
            }
        }
    }

    fn weigh_exactly(&mut self, pass: &Pass<'_, T>, queries: Range<usize>, keys: Range<usize>, row: Row<'_, '_, T>) {
        let (bq, bk) = (queries.len(), keys.len());
        let f = &mut self.f[..bk * bq];
        // Scores without the row's constant that the key shift takes from those of the far keys.
        if !pass.tokens.shifts.key.is_empty() {
            let mut constants = [T::ZERO; NEAR_TILE];
            for (constant, i) in constants.iter_mut().zip(queries.clone()) {
                *constant = T::of(pass.tokens.row_constant(i));
            }
            for row in f.chunks_exact_mut(bq) {
                row.iter_mut().zip(&constants).for_each(|(s, &constant)| *s -= constant);
            }
        }
        if let Some(bias) = pass.tokens.head.key_bias {
            add_bias(bias.subrows(keys.start, bk).iter().copied(), bq, f);
        }
        pass.tokens.head.mask.hide(queries.clone(), keys, pass.tokens.head.m(), f);
        match row {
            Row::Find { max, far } => {
                match far {
                    Some(far) => max.iter_mut().zip(far).for_each(|(max, far)| *max = T::of(far.level)),
                    None => max.fill(T::NEG_INFINITY),
                }
                exponentials(f, max, &mut self.sums[..bq]);
                max.iter_mut().filter(|max| **max == T::NEG_INFINITY).for_each(|max| *max = T::ZERO);
            }
            Row::Known(up) => {
                let (max, scale) = (&up.rows.max[queries.clone()], &up.rows.scale[queries]);
                vectorised(
                    #[inline(always)]
                    || {
                        for row in f.chunks_exact_mut(bq) {
                            for ((s, &max), &scale) in row.iter_mut().zip(max).zip(scale) {
                                *s = (*s - max).exp_nonpositive() * scale;
                            }
                        }
                    },
                );
            }
        }
    }

    fn weigh_by_polynomial(
        &mut self,
        pass: &Pass<'_, T>,
        coefficients: &[f64],
        queries: Range<usize>,
        keys: Range<usize>,
        row: Row<'_, '_, T>,
    ) {
        let bq = queries.len();
        let a: Vec<T> = coefficients.iter().map(|&a| T::of(a)).collect();
        let (max, scale): (&[T], _) = match row {
            Row::Known(up) => (&up.rows.max[queries.clone()], Some(&up.rows.scale[queries.clone()])),
            Row::Find { max, far } => {
                // Weights are at most 1 relative to the largest bias that the query sees.
                let level = far.map_or(f64::NEG_INFINITY, |far| far[0].level);
                let mut seen = level.max(pass.tokens.level(keys.start..queries.start));
                for (max, i) in max.iter_mut().zip(queries.clone()) {
                    seen = seen.max(pass.tokens.bias(i));
                    *max = if seen.is_finite() { T::of(seen) } else { T::ZERO };
                }
                (&*max, None)
            }
        };
        self.sums.fill(T::ZERO);
        for j in 0..keys.len() {
            let f = &mut self.f[j * bq..][..bq];
            let mut slope = self.slope.get_mut(j * bq..(j + 1) * bq);
            for i in 0..bq {
                let seen = keys.start + j <= queries.start + i;
                let w = if seen { pass.tokens.weight(keys.start + j, max[i].to_f64()) } else { T::ZERO };
                let (s, factor) = (f[i], w * scale.map_or(T::ONE, |s| s[i]));
                let (mut p, mut dp) = (T::ZERO, T::ZERO);
                for &a in a.iter().rev() {
                    dp = dp * s + p;
                    p = p * s + a;
                }
                let used = w != T::ZERO;
                f[i] = if used { p * factor } else { T::ZERO };
                self.sums[i] += f[i];
                if let Some(slope) = &mut slope {
                    slope[i] = if used { dp * factor } else { T::ZERO };
                }
            }
        }
    }

    /// Fills `ds` with the gradients of the scores, `slope_ij (dout_i.v_j - delta_i)`, where the slope is `f` unless it differs.
    pub fn score_gradients(
        &mut self,
        pass: &Pass<'_, T>,
        up: &Upstream<'_, T>,
        queries: Range<usize>,
        keys: Range<usize>,
    ) {
        let (bq, bk) = (queries.len(), keys.len());
        load_transposed(up.dout, queries.start, bq, &[], &mut self.columns);
        let dout = view(&self.columns, pass.tokens.head.d_v(), bq);
        product(view_mut(&mut self.ds, bk, bq), pass.tokens.head.v.subrows(keys.start, bk), dout, T::ONE);
        let delta = &up.delta[queries];
        let slope = if Self::has_slope(pass) { &self.slope } else { &self.f };
        let (slope, ds) = (&slope[..bk * bq], &mut self.ds[..bk * bq]);
        vectorised(
            #[inline(always)]
            || {
                for (slope, ds) in slope.chunks_exact(bq).zip(ds.chunks_exact_mut(bq)) {
                    for ((ds, &slope), &delta) in ds.iter_mut().zip(slope).zip(delta) {
                        *ds = slope.times(*ds - delta);
                    }
                }
            },
        );
    }

    /// Adds `dq_i = c sum_j ds_ij k'_j` over the near keys.
    pub fn add_query_gradients(&self, pass: &Pass<'_, T>, keys: &Range<usize>, dq: &mut [T]) {
        let head = pass.tokens.head;
        let (d, scale) = (head.d(), T::of(head.scores.scale));
        let bq = dq.len() / d;
        let (ds, k) = (view(&self.ds, keys.len(), bq), head.k.subrows(keys.start, keys.len()));
        add_product(view_mut(dq, bq, d), ds.transpose(), k, scale);
        let beta = &pass.tokens.shifts.key;
        if !beta.is_empty() {
            // Of shifted keys, as the far part's is.
            for (t, dq) in dq.chunks_exact_mut(d).enumerate() {
                let sum = scale * ds.col(t).iter().copied().sum::<T>();
                dq.iter_mut().zip(beta).for_each(|(dq, &beta)| *dq -= sum * beta);
            }
        }
    }

    /// Adds what some queries give the keys `part` of `keys`: `dk_j = c sum_i ds_ij q_i`, `dv_j = sum_i f_ij dout_i` and
    /// `db_j = sum_i f_ij (dout_i.v_j - delta_i)`.
    pub fn add_key_gradients(
        &self,
        pass: &Pass<'_, T>,
        up: &Upstream<'_, T>,
        queries: &Range<usize>,
        keys: &Range<usize>,
        part: Range<usize>,
        grads: HeadGrads<'_, T>,
    ) {
        let head = pass.tokens.head;
        let (d, d_v, bq) = (head.d(), head.d_v(), queries.len());
        let (q, dout) = (head.q.subrows(queries.start, bq), up.dout.subrows(queries.start, bq));
        let rows = |x| view(x, keys.len(), bq).subrows(part.start - keys.start, part.len());
        let len = part.len();
        add_product(view_mut(grads.dk, len, d), rows(&self.ds), q, T::of(head.scores.scale));
        add_product(view_mut(grads.dv, len, d_v), rows(&self.f), dout, T::ONE);
        if let Some(db) = grads.dkey_bias {
            if !Self::has_slope(pass) {
                for (db, ds) in db.iter_mut().zip(rows(&self.ds).row_iter()) {
                    *db += ds.iter().copied().sum::<T>();
                }
                return;
            }
            // db takes f where dk takes the slope: the weight's derivative by the bias is the weight itself.
            for (j, db) in db.iter_mut().enumerate().take(len) {
                let v = head.v.row(part.start + j);
                let f = rows(&self.f).row(j);
                for i in 0..bq {
                    let dot: T = (0..d_v).map(|c| dout[(i, c)] * v[c]).sum();
                    *db += f[i].times(dot - up.delta[queries.start + i]);
                }
            }
        }
    }
}
