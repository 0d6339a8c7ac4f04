//! Gradients within a tolerance: sifted before what is dear is computed, held against exact ones, and computed exactly
//! where they miss.

use faer::{Mat, MatRef};

use super::{Saved, of_the_engine, samples};
use crate::context::Context;
use crate::engines::exact;
use crate::engines::polynomial::Form;
use crate::error::{Error, Result};
use crate::measure::exact_rows::{ExactRows, exact_rows, gather};
use crate::measure::guides::{self, Known};
use crate::measure::key_gradients::{KeyGradients, Pairs, Queries, Weights, key_gradients, unseen_row_sums};
use crate::measure::{Draw, ErrorEstimate};
use crate::memory::{collected, copied, filled, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::{TILE, product, tiles, view_mut};
use crate::plan::moments::{Moments, PolynomialWeights};
use crate::plan::report::HeadReport;
use crate::problem::finite::all_finite;
use crate::problem::grads::{HeadGrads, RowFactors, Upstream, delta};
use crate::problem::heads::{Head, Heads};
use crate::problem::scores::Scores;
use crate::spec::{Auto, Engine};

/// What costs less than this, relative to exact attention, is run at once, and checked afterwards alone.
const SIFTED: f64 = 0.08;

/// The gradients of one key head, and what it shares with the query heads `first..first + group`.
pub(crate) struct Group<'a, 'b, T> {
    pub heads: &'a Heads<'b, T>,
    pub scores: &'a Scores,
    pub saved: &'a Saved<T>,
    /// Of all heads.
    pub out: &'a [T],
    pub dout: &'a [MatRef<'b, T>],
    pub first: usize,
    pub group: usize,
}

/// Exact gradients of sampled queries and keys of a group, and those of its polynomials.
struct Check {
    /// Of each query head, unless it is left out.
    queries: Vec<Option<QueryCheck>>,
    keys: Draw,
    exact: KeyGradients,
    /// What the row sums of queries that were not drawn may add to the squared errors of dk, dv and the bias.
    unseen: Vec<[f64; 3]>,
    /// Where every head is exact or a polynomial.
    own: Option<KeyGradients>,
}

/// What a check is for.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    /// Whether the queries of exact heads are checked too.
    exact_heads: bool,
    /// Whether polynomials are computed by their definition too, to be sifted before they are run.
    sift: bool,
}

/// Sampled queries of a head.
struct QueryCheck {
    draw: Draw,
    out: Mat<f64>,
    dq: Mat<f64>,
    /// The dq of the polynomial, by its definition.
    own: Option<Mat<f64>>,
}

/// Measured errors of a group: of each head's dq, then of dk, dv and the bias.
struct GroupErrors {
    dq: Vec<Option<ErrorEstimate>>,
    dk: ErrorEstimate,
    dv: ErrorEstimate,
    db: ErrorEstimate,
}

impl GroupErrors {
    /// The worst of an end of the errors, and of what.
    fn worst(&self, biased: bool, end: impl Fn(&ErrorEstimate) -> f64) -> (f64, &'static str) {
        let dq = self.dq.iter().flatten().map(|e| (end(e), "dq"));
        let db = if biased { end(&self.db) } else { 0.0 };
        let others = [(end(&self.dk), "dk"), (end(&self.dv), "dv"), (db, "dkey_bias")];
        // What is no number is the worst of all.
        let numbers = dq.chain(others).map(|(e, of)| (if e.is_nan() { f64::INFINITY } else { e }, of));
        numbers.fold((0.0, "nothing"), |worst, e| if e.0 > worst.0 { e } else { worst })
    }
}

impl<T: Real> Group<'_, '_, T> {
    /// Adds the gradients within a tolerance: `grads` are of the key head, `dq` of all its query heads. Returns a report
    /// for each of those.
    pub fn backward_within(
        &self,
        ctx: &Context,
        auto: &Auto,
        dq: &mut [T],
        mut grads: HeadGrads<'_, T>,
    ) -> Result<Vec<HeadReport>> {
        let mut reports = self.saved.reports[self.first..self.first + self.group].to_vec();
        if self.indices().all(|i| self.saved.heads[i].is_exact()) {
            self.backward(ctx, dq, &mut grads)?;
            return Ok(reports);
        }
        let biased = grads.dkey_bias.is_some();
        let dear = reports.iter().any(|report| report.plan.cost > SIFTED * report.plan.exact_cost);
        let samples = samples(self.rows().max(self.heads.k[0].nrows()));
        let mut missed = None;
        if dear {
            // Before anything dear is computed for all tokens: what the polynomials' own gradients are.
            let sift =
                Check::new(ctx, self, samples / 2, auto.seed ^ 0x51, Wanted { exact_heads: false, sift: true }, None)?;
            missed = sift.own_errors()?.and_then(|errors| too_large(&errors, biased, auto.tol, |e| e.relative));
        }
        if missed.is_none() {
            match of_the_engine(self.backward(ctx, dq, &mut grads))? {
                Ok(()) => {
                    let results = Some((&*dq, &grads));
                    let wanted = Wanted { exact_heads: false, sift: false };
                    let check = Check::new(ctx, self, samples, auto.seed ^ 0xB0, wanted, results)?;
                    let errors = check.errors(self, dq, &grads)?;
                    missed = too_large(&errors, biased, auto.tol, |e| e.high);
                    if !(all_finite(dq) && all_finite(grads.dk) && all_finite(grads.dv)) {
                        missed = Some("overflow".into());
                    }
                    if missed.is_none() {
                        for (report, dq) in reports.iter_mut().zip(&errors.dq) {
                            report.set(&errors, *dq, biased);
                        }
                        return Ok(reports);
                    }
                }
                Err(text) => missed = Some(text),
            }
        }
        self.backward_exactly(ctx, dq, &mut grads)?;
        for (report, i) in reports.iter_mut().zip(self.indices()) {
            if !self.saved.heads[i].is_exact() {
                let why = missed.as_deref().unwrap_or("not usable");
                let name = self.saved.heads[i].name();
                report.missed = Some(format!("the gradients of {name}, computed exactly instead: {why}"));
            }
        }
        Ok(reports)
    }

    /// Adds the gradients, whatever they are worth, and measures them on so many queries and keys of each head.
    pub fn backward_measured(
        &self,
        ctx: &Context,
        engine: &Engine,
        samples: usize,
        dq: &mut [T],
        mut grads: HeadGrads<'_, T>,
    ) -> Result<Vec<HeadReport>> {
        self.backward(ctx, dq, &mut grads)?;
        let wanted = Wanted { exact_heads: true, sift: false };
        let check = Check::new(ctx, self, samples, 0, wanted, Some((&*dq, &grads)))?;
        let errors = check.errors(self, dq, &grads)?;
        let biased = grads.dkey_bias.is_some();
        let d_v = self.heads.v[0].ncols();
        let reports = self.indices().zip(&errors.dq).zip(&check.queries).map(|((i, dq), query)| {
            let out = self.out_of(i);
            let mut report = HeadReport::given(engine.clone());
            let of_out = |query: &QueryCheck| query.draw.compare(&query.out, out, d_v);
            report.errors.out = query.as_ref().map(of_out).transpose()?;
            report.error_bound = self.saved.heads[i].error_bound(&self.head(i), out);
            report.set(&errors, *dq, biased);
            Ok(report)
        });
        reports.collect()
    }

    /// Adds the gradients by the engines of the forward pass.
    pub fn backward(&self, ctx: &Context, dq: &mut [T], grads: &mut HeadGrads<'_, T>) -> Result<()> {
        for (i, dq) in self.indices().zip(dq.chunks_mut(self.rows() * self.heads.q[0].ncols())) {
            let delta = delta(self.dout[i], self.out_of(i))?;
            let up = Upstream { dout: self.dout[i], delta: &delta, rows: self.saved.rows(i) };
            self.saved.heads[i].backward(ctx, &self.head(i), up, reborrow(dq, grads))?;
        }
        Ok(())
    }

    /// Replaces the gradients by exact ones.
    fn backward_exactly(&self, ctx: &Context, dq: &mut [T], grads: &mut HeadGrads<'_, T>) -> Result<()> {
        grads.dk.fill(T::ZERO);
        grads.dv.fill(T::ZERO);
        if let Some(db) = &mut grads.dkey_bias {
            db.fill(T::ZERO);
        }
        let n = self.rows();
        for (i, dq) in self.indices().zip(dq.chunks_mut(n * self.heads.q[0].ncols())) {
            let head = self.head(i);
            let mut out = zeroed(n * head.d_v(), "a head's exact output")?;
            let (mut max, mut scale) = (zeroed(n, "row maxima")?, zeroed(n, "row sums")?);
            exact::forward(ctx, &head, &mut out, &mut max, &mut scale)?;
            let delta = delta(self.dout[i], &out)?;
            let rows = RowFactors { max: &max, scale: &scale };
            let up = Upstream { dout: self.dout[i], delta: &delta, rows };
            exact::backward(ctx, &head, up, reborrow(dq, grads))?;
        }
        Ok(())
    }

    fn head(&self, i: usize) -> Head<'_, T> {
        self.heads.head(i, self.scores)
    }

    fn indices(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.group
    }

    /// Keys drawn by what all heads that share them say of them, and by their gradients where they are there.
    fn draw_keys(
        &self,
        known: &[Known],
        dout: &[Vec<f64>],
        samples: usize,
        seed: u64,
        grads: Option<&HeadGrads<'_, T>>,
    ) -> Result<Draw> {
        let of_head = |i: usize| known[i].key_guides(&self.head(self.first + i), &dout[i]);
        let mut all = of_head(0)?;
        for i in 1..self.group {
            for (all, own) in all.iter_mut().zip(of_head(i)?) {
                all.iter_mut().zip(own).for_each(|(all, own)| *all += own);
            }
        }
        if let Some(grads) = grads {
            all.push(guides::squares_of(grads.dk, self.heads.k[0].ncols())?);
            all.push(guides::squares_of(grads.dv, self.heads.v[0].ncols())?);
        }
        Draw::new(self.heads.k[0].nrows(), samples, seed, &all)
    }

    fn rows(&self) -> usize {
        self.heads.q[0].nrows()
    }

    fn out_of(&self, i: usize) -> &[T] {
        let len = self.rows() * self.heads.v[0].ncols();
        &self.out[i * len..(i + 1) * len]
    }
}

fn too_large(errors: &GroupErrors, biased: bool, tol: f64, end: impl Fn(&ErrorEstimate) -> f64) -> Option<String> {
    let (worst, of) = errors.worst(biased, end);
    (worst > tol).then(|| format!("{of} errs by up to {worst:.1e}"))
}

fn reborrow<'a, T>(dq: &'a mut [T], grads: &'a mut HeadGrads<'_, T>) -> HeadGrads<'a, T> {
    HeadGrads { dq, dk: &mut *grads.dk, dv: &mut *grads.dv, dkey_bias: grads.dkey_bias.as_deref_mut() }
}

impl HeadReport {
    fn set(&mut self, errors: &GroupErrors, dq: Option<ErrorEstimate>, biased: bool) {
        self.errors.dq = dq;
        self.errors.dk = Some(errors.dk);
        self.errors.dv = Some(errors.dv);
        self.errors.dkey_bias = biased.then_some(errors.db);
    }
}

/// What errors call scores of drawn queries and keys.
const PAIRS: &str = "pairs of drawn queries and keys";

/// Row sums of drawn queries, exact and the engine's.
struct RowSums<'a> {
    draw: &'a Draw,
    exact: &'a [f64],
    /// `dout_i.out_i`, exact.
    delta: Vec<f64>,
    own: Vec<f64>,
    /// By how much logarithms of the exact sums are larger, on average over what `dout` holds. Other rows are taken to be
    /// off by as much.
    mean_change: f64,
}

impl<'a> RowSums<'a> {
    fn new(draw: &'a Draw, dout: &Mat<f64>, exact: &'a ExactRows, log_sums: &[f64]) -> Self {
        let dot = |i: usize| dout.row(i).iter().zip(exact.out.row(i).iter()).map(|(a, b)| a * b).sum();
        let own: Vec<f64> = draw.rows.iter().map(|&row| log_sums[row]).collect();
        let (mut total, mut changes) = (0.0, 0.0);
        for (i, (exact, own)) in exact.log_sums.iter().zip(&own).enumerate() {
            // Rows that are taken for certain stand for no others.
            let weight = (draw.weights[i] - 1.0) * dout.row(i).squared_norm_l2();
            total += weight;
            changes += weight * (exact - own);
        }
        let mean_change = if total > 0.0 { changes / total } else { 0.0 };
        let own = own.into_iter().map(|own| own + mean_change).collect();
        Self { draw, exact: &exact.log_sums, delta: (0..dout.nrows()).map(dot).collect(), own, mean_change }
    }

    /// See [`unseen_row_sums`].
    fn unseen<T: Real>(
        &self,
        head: &Head<'_, T>,
        keys: &[usize],
        dout: &Mat<f64>,
        own_delta: &[T],
    ) -> Result<Vec<[f64; 3]>> {
        let (rows, width, scale) = (&self.draw.rows, keys.len(), head.scores.scale);
        let (q, k, v) = (gather(head.q, rows)?, gather(head.k, keys)?, gather(head.v, keys)?);
        let own_delta = collected(rows.iter().map(|&row| own_delta[row].to_f64()), PAIRS)?;
        let squares = |x: &Mat<f64>, by: f64| collected(x.row_iter().map(|row| by * row.squared_norm_l2()), PAIRS);
        let squares = [squares(&q, scale * scale)?, squares(dout, 1.0)?];
        let (mut scores, mut upstream) = (zeroed(TILE * width, PAIRS)?, zeroed(TILE * width, PAIRS)?);
        let mut all = filled(width, [0.0; 3], PAIRS)?;
        for (first, count) in tiles(0..rows.len(), TILE) {
            let some = first..first + count;
            let (scores, upstream) = (&mut scores[..count * width], &mut upstream[..count * width]);
            product(view_mut(scores, count, width), q.subrows(first, count), k.transpose(), scale);
            product(view_mut(upstream, count, width), dout.subrows(first, count), v.transpose(), 1.0);
            for (&row, scores) in rows[some.clone()].iter().zip(scores.chunks_exact_mut(width)) {
                let seen = head.seen(row);
                for (&j, s) in keys.iter().zip(scores) {
                    let bias = head.bias(j);
                    let hidden = bias == f64::NEG_INFINITY || !seen.contains(&j);
                    *s = if hidden { f64::NEG_INFINITY } else { *s + bias };
                }
            }
            let pairs = Pairs {
                scores,
                upstream,
                weights: &self.draw.weights[some.clone()],
                exact: [&self.exact[some.clone()], &self.delta[some.clone()]],
                engine: [&self.own[some.clone()], &own_delta[some.clone()]],
                squares: [&squares[0][some.clone()], &squares[1][some]],
            };
            unseen_row_sums(&pairs, &mut all);
        }
        Ok(all)
    }
}

impl Check {
    /// On so many queries of each head, and keys; drawn by `results` too, dq and the others, where they are there.
    fn new<T: Real>(
        ctx: &Context,
        of: &Group<'_, '_, T>,
        samples: usize,
        seed: u64,
        wanted: Wanted,
        results: Option<(&[T], &HeadGrads<'_, T>)>,
    ) -> Result<Self> {
        let d = of.heads.q[0].ncols();
        let known: Vec<Known> = of.indices().map(|i| Known::new(&of.head(i))).collect::<Result<_>>()?;
        let sizes: Vec<Vec<f64>> = of.indices().map(|i| guides::squares(of.dout[i])).collect::<Result<_>>()?;
        let keys = of.draw_keys(&known, &sizes, samples, seed, results.map(|results| results.1))?;
        let mut unseen = vec![[0.0; 3]; keys.rows.len()];
        let (mut sums, mut queries): (Option<(KeyGradients, Option<KeyGradients>)>, _) = (None, Vec::new());
        for i in of.indices() {
            let (head, prepared) = (of.head(i), &of.saved.heads[i]);
            let log_sums = prepared.log_row_sums(&head, of.saved.rows(i))?;
            let mut guides = known[i - of.first].query_guides(&head, Some(&sizes[i - of.first]))?;
            if let Some((dq, _)) = results {
                let rows = of.rows() * d;
                guides.push(guides::squares_of(&dq[(i - of.first) * rows..(i - of.first + 1) * rows], d)?);
            }
            let draw = Draw::new(head.q.nrows(), samples, seed ^ 1, &guides)?;
            let dout = gather(of.dout[i], &draw.rows)?;
            let form = if wanted.sift { prepared.polynomial() } else { None };
            let moments = match form {
                Some(Form { coefficients, shifts, near, consistent }) => {
                    Moments::new(ctx, &head, &draw.rows, shifts, *near, coefficients.len() - 1, Some(&dout))?
                        .map(|moments| (moments.exact(), moments.polynomial(coefficients, *consistent)))
                }
                None => None,
            };
            // Exact row sums where they are known, those of the engine elsewhere.
            let (mut exact_sums, own_delta) = (copied(&log_sums, "row sums")?, delta(of.dout[i], of.out_of(i))?);
            let mut delta = copied(&own_delta, "products of dout and out")?;
            let (out, dq, own_dq) = match moments {
                Some(((out, dq), own)) => (out, dq, own.and_then(|own| own.1)),
                None if !wanted.exact_heads && prepared.is_exact() => (Mat::new(), None, None),
                None => {
                    let exact = exact_rows(ctx, &head, &draw.rows, Some(&dout))?;
                    let sums = RowSums::new(&draw, &dout, &exact, &log_sums);
                    exact_sums.iter_mut().for_each(|log_sum| *log_sum += sums.mean_change);
                    let added = sums.unseen(&head, &keys.rows, &dout, &own_delta)?;
                    for (all, added) in unseen.iter_mut().zip(added) {
                        all.iter_mut().zip(added).for_each(|(all, added)| *all += added);
                    }
                    for ((&row, &log_sum), &exact) in draw.rows.iter().zip(&exact.log_sums).zip(&sums.delta) {
                        exact_sums[row] = log_sum;
                        delta[row] = T::of(exact);
                    }
                    (exact.out, exact.dq, None)
                }
            };
            let up = Queries { dout: of.dout[i], delta: &delta, log_sums: &exact_sums };
            queries.push(dq.map(|dq| QueryCheck { draw, out, dq, own: own_dq }));
            let weights = form.map(|form| PolynomialWeights { head: &head, form, log_sums: &log_sums });
            let weights = weights.as_ref().map(|weights| weights as &dyn Weights);
            let (exact, mut own) = key_gradients(ctx, &head, &keys.rows, up, weights)?;
            if prepared.is_exact() {
                own = Some(exact.clone());
            }
            sums = Some(match sums {
                None => (exact, own),
                Some((mut total, total_own)) => {
                    total.add(&exact);
                    let both = total_own.zip(own).map(|(mut total, own)| {
                        total.add(&own);
                        total
                    });
                    (total, both)
                }
            });
        }
        let Some((exact, own)) = sums else {
            return Err(Error::Argument("a group of no heads".into()));
        };
        Ok(Self { queries, keys, exact, unseen, own })
    }

    /// Those of the polynomials by their definition, where every head is one or exact.
    fn own_errors(&self) -> Result<Option<GroupErrors>> {
        let Some(own) = &self.own else { return Ok(None) };
        let dq = self.queries.iter().map(|query| {
            let of_dq = query.as_ref().and_then(|q| Some(q.draw.compare_drawn(&q.dq, q.own.as_ref()?)));
            of_dq.transpose()
        });
        let keys = |exact: &Mat<f64>, got: &Mat<f64>| self.keys.compare_drawn(exact, got);
        Ok(Some(GroupErrors {
            dq: dq.collect::<Result<_>>()?,
            dk: keys(&self.exact.dk, &own.dk)?,
            dv: keys(&self.exact.dv, &own.dv)?,
            db: keys(&self.exact.db, &own.db)?,
        }))
    }

    /// Those of results.
    fn errors<T: Real>(&self, of: &Group<'_, '_, T>, dq: &[T], grads: &HeadGrads<'_, T>) -> Result<GroupErrors> {
        let (d, d_v) = (of.heads.q[0].ncols(), of.heads.v[0].ncols());
        let dq = (self.queries.iter().zip(dq.chunks(of.rows() * d)))
            .map(|(query, dq)| query.as_ref().map(|query| query.draw.compare(&query.dq, dq, d)).transpose())
            .collect::<Result<_>>()?;
        let keys = |exact: &Mat<f64>, got: &[T], width: usize, kind: usize| {
            self.keys.compare_with(exact, got, width, |j| self.unseen[j][kind])
        };
        Ok(GroupErrors {
            dq,
            dk: keys(&self.exact.dk, grads.dk, d, 0)?,
            dv: keys(&self.exact.dv, grads.dv, d_v, 1)?,
            db: match &grads.dkey_bias {
                Some(db) => keys(&self.exact.db, db, 1, 2)?,
                None => ErrorEstimate { relative: 0.0, low: 0.0, high: 0.0, rows: 0 },
            },
        })
    }
}
