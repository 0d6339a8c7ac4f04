//! Gradients within a tolerance: polynomials are sifted before anything dear is computed, results are held against exact
//! ones, and what misses is computed exactly.

use super::check::{Check, GroupErrors, QueryCheck, Wanted};
use super::group::Group;
use super::{of_the_engine, samples};
use crate::context::Context;
use crate::engines::exact;
use crate::error::Result;
use crate::measure::ErrorEstimate;
use crate::memory::zeroed;
use crate::numerics::real::Real;
use crate::plan::report::HeadReport;
use crate::problem::finite::all_finite;
use crate::problem::grads::{BiasGrads, Extras, HeadGrads, RowFactors, Upstream, delta, sink_gradient};
use crate::spec::{Auto, Engine};

/// Engines that cost less than this, relative to exact attention, are run at once, without being sifted.
const SIFTED: f64 = 0.08;

impl<T: Real> Group<'_, '_, T> {
    /// Adds the gradients within a tolerance, and returns a report for each query head. `grads` are those of the key head,
    /// `dq` those of all its query heads.
    ///
    /// Time of the engines that were chosen and of the samples' exact gradients, and of exact gradients where they miss.
    pub fn backward_within(
        &self,
        ctx: &Context,
        auto: &Auto,
        dq: &mut [T],
        mut grads: HeadGrads<'_, T>,
        mut extras: Extras<'_, T>,
    ) -> Result<Vec<HeadReport>> {
        let mut reports = self.saved.reports[self.first..self.first + self.group].to_vec();
        if self.indices().all(|i| self.saved.heads[i].is_exact()) {
            self.backward(ctx, dq, &mut grads, &mut extras)?;
            return Ok(reports);
        }
        let biased = grads.dkey_bias.is_some();
        let dear = reports.iter().any(|report| report.plan.cost > SIFTED * report.plan.exact_cost);
        let samples = samples(self.rows().max(self.heads.k[0].nrows()));
        let mut missed = None;
        if dear {
            // On samples, by the definition of the polynomials, before anything dear is computed for all tokens.
            let wanted = Wanted { exact_heads: false, sift: true };
            let check = Check::new(ctx, self, samples / 2, auto.seed ^ 0x51, wanted, None)?;
            let errors = check.polynomial_errors()?;
            missed = errors.and_then(|errors| too_large(&errors, biased, auto.tol, |e| e.relative));
        }
        if missed.is_none() {
            match of_the_engine(self.backward(ctx, dq, &mut grads, &mut extras))? {
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
        self.backward_exactly(ctx, dq, &mut grads, &mut extras)?;
        for (report, i) in reports.iter_mut().zip(self.indices()) {
            if !self.saved.heads[i].is_exact() {
                let why = missed.as_deref().unwrap_or("not usable");
                let name = self.saved.heads[i].name();
                report.missed = Some(format!("the gradients of {name}, computed exactly instead: {why}"));
            }
        }
        Ok(reports)
    }

    /// Adds the gradients, whatever their errors, which are measured on `samples` queries and keys of each head.
    pub fn backward_measured(
        &self,
        ctx: &Context,
        engine: &Engine,
        samples: usize,
        dq: &mut [T],
        mut grads: HeadGrads<'_, T>,
        mut extras: Extras<'_, T>,
    ) -> Result<Vec<HeadReport>> {
        self.backward(ctx, dq, &mut grads, &mut extras)?;
        let wanted = Wanted { exact_heads: true, sift: false };
        let check = Check::new(ctx, self, samples, 0, wanted, Some((&*dq, &grads)))?;
        let errors = check.errors(self, dq, &grads)?;
        let biased = grads.dkey_bias.is_some();
        let d_v = self.heads.v[0].ncols();
        let reports = self.indices().zip(&errors.dq).zip(&check.queries).map(|((i, dq), query)| {
            let out = self.out_of(i);
            let mut report = HeadReport::given(engine.clone());
            let error_of_out = |query: &QueryCheck| query.draw.compare(&query.out, out, d_v);
            report.errors.out = query.as_ref().map(error_of_out).transpose()?;
            report.error_bound = self.saved.heads[i].error_bound(&self.head(i), out);
            report.set(&errors, *dq, biased);
            Ok(report)
        });
        reports.collect()
    }

    /// Adds the gradients by the engines of the forward pass.
    pub fn backward(
        &self,
        ctx: &Context,
        dq: &mut [T],
        grads: &mut HeadGrads<'_, T>,
        extras: &mut Extras<'_, T>,
    ) -> Result<()> {
        for (i, dq) in self.indices().zip(dq.chunks_mut(self.rows() * self.heads.q[0].ncols())) {
            let delta = delta(self.dout[i], self.out_of(i))?;
            let up = Upstream { dout: self.dout[i], delta: &delta, rows: self.saved.rows(i) };
            self.saved.heads[i].backward(
                ctx,
                &self.head(i),
                up,
                reborrow(dq, grads),
                extras.dbias.as_mut().map(BiasGrads::reborrow),
            )?;
            if let (Some(sink), Some(to)) = (self.head(i).sink, extras.dsinks.get_mut(i - self.first)) {
                *to = sink_gradient(sink, &self.saved.lse[i * self.rows()..(i + 1) * self.rows()], &delta);
            }
        }
        Ok(())
    }

    /// Replaces the gradients by exact ones.
    fn backward_exactly(
        &self,
        ctx: &Context,
        dq: &mut [T],
        grads: &mut HeadGrads<'_, T>,
        extras: &mut Extras<'_, T>,
    ) -> Result<()> {
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
            exact::backward(ctx, &head, up, reborrow(dq, grads), extras.dbias.as_mut().map(BiasGrads::reborrow))?;
        }
        Ok(())
    }
}

/// Which error is the worst by one of its numbers, where that is above the tolerance.
fn too_large(errors: &GroupErrors, biased: bool, tol: f64, end: impl Fn(&ErrorEstimate) -> f64) -> Option<String> {
    let (worst, name) = errors.worst(biased, end);
    (worst > tol).then(|| format!("{name} errs by up to {worst:.1e}"))
}

/// One query head's gradients: its dq, and those of the key head.
fn reborrow<'a, T>(dq: &'a mut [T], grads: &'a mut HeadGrads<'_, T>) -> HeadGrads<'a, T> {
    HeadGrads { dq, dk: &mut *grads.dk, dv: &mut *grads.dv, dkey_bias: grads.dkey_bias.as_deref_mut() }
}

impl HeadReport {
    /// Reports the errors of the gradients, dq's being the head's own.
    fn set(&mut self, errors: &GroupErrors, dq: Option<ErrorEstimate>, biased: bool) {
        self.errors.dq = dq;
        self.errors.dk = Some(errors.dk);
        self.errors.dv = Some(errors.dv);
        self.errors.dkey_bias = biased.then_some(errors.db);
    }
}
