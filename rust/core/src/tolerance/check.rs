//! Gradients held against exact ones on samples: of the queries of each head, and of the keys that heads share.
//!
//! Exact gradients of drawn keys take all queries, and their row sums `D_i` and `delta_i`. These are exact for drawn
//! queries alone; other queries have those of the engine, the sums corrected by what the drawn ones are off on average,
//! and an allowance for what the correction leaves: see [`unseen_row_sums`].

use faer::Mat;

use super::group::Group;
use crate::context::Context;
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
use crate::problem::grads::{HeadGrads, delta};
use crate::problem::heads::Head;

/// Exact gradients of sampled queries and keys of a group, and those of its polynomials.
pub(super) struct Check {
    /// The queries of each head; `None` of heads that are left out.
    pub queries: Vec<Option<QueryCheck>>,
    /// The keys.
    keys: Draw,
    /// Their exact gradients.
    exact: KeyGradients,
    /// For each key, what the row sums of queries that were not drawn may add to the squared errors of dk, dv and db.
    unseen: Vec<[f64; 3]>,
    /// Their gradients by the polynomials' definition, where every head is a polynomial or exact.
    polynomial: Option<KeyGradients>,
}

/// What a check is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Whether the queries of exact heads are checked too.
    pub exact_heads: bool,
    /// Whether polynomials are computed by their definition too, to be sifted before they are run.
    pub sift: bool,
}

/// Sampled queries of a head.
pub(super) struct QueryCheck {
    pub draw: Draw,
    /// Exact rows of out, `(rows, d_v)`, and of dq, `(rows, d)`.
    pub out: Mat<f64>,
    dq: Mat<f64>,
    /// The rows of dq by the polynomial's definition, where there is one.
    polynomial_dq: Option<Mat<f64>>,
}

/// Measured errors of a group: of each head's dq, then of dk, dv and the bias.
pub(super) struct GroupErrors {
    pub dq: Vec<Option<ErrorEstimate>>,
    pub dk: ErrorEstimate,
    pub dv: ErrorEstimate,
    pub db: ErrorEstimate,
}

impl GroupErrors {
    /// The largest of the errors, each taken by one of its numbers, and of which result it is.
    pub fn worst(&self, biased: bool, end: impl Fn(&ErrorEstimate) -> f64) -> (f64, &'static str) {
        let dq = self.dq.iter().flatten().map(|e| (end(e), "dq"));
        let db = if biased { end(&self.db) } else { 0.0 };
        let others = [(end(&self.dk), "dk"), (end(&self.dv), "dv"), (db, "dkey_bias")];
        // What is no number is the worst of all.
        let numbers = dq.chain(others).map(|(e, name)| (if e.is_nan() { f64::INFINITY } else { e }, name));
        numbers.fold((0.0, "nothing"), |worst, e| if e.0 > worst.0 { e } else { worst })
    }
}

impl Check {
    /// A check on `samples` queries of each head, and keys. `results`, dq and the others, are what they are drawn by too, where
    /// they are there.
    pub fn new<T: Real>(
        ctx: &Context,
        group: &Group<'_, '_, T>,
        samples: usize,
        seed: u64,
        wanted: Wanted,
        results: Option<(&[T], &HeadGrads<'_, T>)>,
    ) -> Result<Self> {
        let known: Vec<Known> = group.indices().map(|i| Known::new(&group.head(i))).collect::<Result<_>>()?;
        let sizes: Vec<Vec<f64>> = group.indices().map(|i| guides::squares(group.dout[i])).collect::<Result<_>>()?;
        let keys = draw_keys(group, &known, &sizes, samples, seed, results.map(|results| results.1))?;
        let mut unseen = vec![[0.0; 3]; keys.rows.len()];
        let (mut sums, mut queries): (Option<(KeyGradients, Option<KeyGradients>)>, _) = (None, Vec::new());
        for (i, (known, sizes)) in group.indices().zip(known.iter().zip(&sizes)) {
            let head = group.head(i);
            let mut guides = known.query_guides(&head, Some(sizes))?;
            if let Some((dq, _)) = results {
                let (d, len) = (head.d(), head.n() * head.d());
                guides.push(guides::squares_of(&dq[(i - group.first) * len..][..len], d)?);
            }
            let draw = Draw::new(head.n(), samples, seed ^ 1, &guides)?;
            let checked = HeadCheck::new(ctx, group, i, draw, &keys.rows, wanted, &mut unseen)?;
            queries.push(checked.queries);
            sums = Some(match sums {
                None => (checked.exact, checked.polynomial),
                Some((mut exact, polynomial)) => {
                    exact.add(&checked.exact);
                    let both = polynomial.zip(checked.polynomial).map(|(mut sum, part)| {
                        sum.add(&part);
                        sum
                    });
                    (exact, both)
                }
            });
        }
        let Some((exact, polynomial)) = sums else {
            return Err(Error::Argument("a group of no heads".into()));
        };
        Ok(Self { queries, keys, exact, unseen, polynomial })
    }

    /// The errors of the polynomials by their definition; `None` unless every head is one or exact.
    pub fn polynomial_errors(&self) -> Result<Option<GroupErrors>> {
        let Some(polynomial) = &self.polynomial else { return Ok(None) };
        let dq = self.queries.iter().map(|query| {
            let error = query.as_ref().and_then(|q| Some(q.draw.compare_drawn(&q.dq, q.polynomial_dq.as_ref()?)));
            error.transpose()
        });
        let of_keys = |exact: &Mat<f64>, got: &Mat<f64>| self.keys.compare_drawn(exact, got);
        Ok(Some(GroupErrors {
            dq: dq.collect::<Result<_>>()?,
            dk: of_keys(&self.exact.dk, &polynomial.dk)?,
            dv: of_keys(&self.exact.dv, &polynomial.dv)?,
            db: of_keys(&self.exact.db, &polynomial.db)?,
        }))
    }

    /// The errors of results: dq of all heads of the group, and the others.
    pub fn errors<T: Real>(&self, group: &Group<'_, '_, T>, dq: &[T], grads: &HeadGrads<'_, T>) -> Result<GroupErrors> {
        let (d, d_v) = (group.heads.q[0].ncols(), group.heads.v[0].ncols());
        let dq = (self.queries.iter().zip(dq.chunks(group.rows() * d)))
            .map(|(query, dq)| query.as_ref().map(|query| query.draw.compare(&query.dq, dq, d)).transpose())
            .collect::<Result<_>>()?;
        let of_keys = |exact: &Mat<f64>, got: &[T], width: usize, kind: usize| {
            self.keys.compare_with(exact, got, width, |j| self.unseen[j][kind])
        };
        Ok(GroupErrors {
            dq,
            dk: of_keys(&self.exact.dk, grads.dk, d, 0)?,
            dv: of_keys(&self.exact.dv, grads.dv, d_v, 1)?,
            db: match &grads.dkey_bias {
                Some(db) => of_keys(&self.exact.db, db, 1, 2)?,
                None => ErrorEstimate { relative: 0.0, low: 0.0, high: 0.0, rows: 0 },
            },
        })
    }
}

/// Draws keys by what all heads that share them say of them, and by their gradients where they are there.
fn draw_keys<T: Real>(
    group: &Group<'_, '_, T>,
    known: &[Known],
    dout: &[Vec<f64>],
    samples: usize,
    seed: u64,
    grads: Option<&HeadGrads<'_, T>>,
) -> Result<Draw> {
    let of_head = |i: usize| known[i].key_guides(&group.head(group.first + i), &dout[i]);
    let mut guides = of_head(0)?;
    for i in 1..group.group {
        for (sum, guide) in guides.iter_mut().zip(of_head(i)?) {
            sum.iter_mut().zip(guide).for_each(|(sum, x)| *sum += x);
        }
    }
    if let Some(grads) = grads {
        guides.push(guides::squares_of(grads.dk, group.heads.k[0].ncols())?);
        guides.push(guides::squares_of(grads.dv, group.heads.v[0].ncols())?);
    }
    Draw::new(group.heads.k[0].nrows(), samples, seed, &guides)
}

/// One head's part in a check.
struct HeadCheck {
    queries: Option<QueryCheck>,
    /// What its queries give the drawn keys, exactly and by the polynomial's definition.
    exact: KeyGradients,
    polynomial: Option<KeyGradients>,
}

impl HeadCheck {
    /// Head `i` of the call, on the queries of `draw` and the `keys`. Adds to `unseen`: see [`Check`].
    fn new<T: Real>(
        ctx: &Context,
        group: &Group<'_, '_, T>,
        i: usize,
        draw: Draw,
        keys: &[usize],
        wanted: Wanted,
        unseen: &mut [[f64; 3]],
    ) -> Result<Self> {
        let (head, prepared) = (group.head(i), &group.saved.heads[i]);
        let log_sums = prepared.log_row_sums(&head, group.saved.rows(i))?;
        let dout = gather(group.dout[i], &draw.rows)?;
        let form = if wanted.sift { prepared.polynomial() } else { None };
        let moments = match form {
            Some(Form { coefficients, shifts, near, consistent }) => {
                Moments::new(ctx, &head, &draw.rows, shifts, *near, coefficients.len() - 1, Some(&dout))?
                    .map(|moments| (moments.exact(), moments.polynomial(coefficients, *consistent)))
            }
            None => None,
        };
        // Exact row sums where they are known, those of the engine elsewhere.
        let (mut exact_sums, engine_delta) = (copied(&log_sums, "row sums")?, delta(group.dout[i], group.out_of(i))?);
        let mut exact_delta = copied(&engine_delta, "products of dout and out")?;
        let (out, dq, polynomial_dq) = match moments {
            Some(((out, dq), rows)) => (out, dq, rows.and_then(|(_, dq)| dq)),
            None if !wanted.exact_heads && prepared.is_exact() => (Mat::new(), None, None),
            None => {
                let exact = exact_rows(ctx, &head, &draw.rows, Some(&dout))?;
                let sums = RowSums::new(&draw, &dout, &exact, &log_sums);
                exact_sums.iter_mut().for_each(|log_sum| *log_sum += sums.mean_change);
                let added = sums.unseen(&head, keys, &dout, &engine_delta)?;
                for (unseen, added) in unseen.iter_mut().zip(added) {
                    unseen.iter_mut().zip(added).for_each(|(unseen, added)| *unseen += added);
                }
                for ((&row, &log_sum), &delta) in draw.rows.iter().zip(&exact.log_sums).zip(&sums.delta) {
                    exact_sums[row] = log_sum;
                    exact_delta[row] = T::of(delta);
                }
                (exact.out, exact.dq, None)
            }
        };
        let up = Queries { dout: group.dout[i], delta: &exact_delta, log_sums: &exact_sums };
        let weights = form.map(|form| PolynomialWeights { head: &head, form, log_sums: &log_sums });
        let weights = weights.as_ref().map(|weights| weights as &dyn Weights);
        let (exact, polynomial) = key_gradients(ctx, &head, keys, up, weights)?;
        let polynomial = if prepared.is_exact() { Some(exact.clone()) } else { polynomial };
        let queries = dq.map(|dq| QueryCheck { draw, out, dq, polynomial_dq });
        Ok(Self { queries, exact, polynomial })
    }
}

/// What errors call scores of drawn queries and keys.
const PAIRS: &str = "pairs of drawn queries and keys";

/// Row sums of drawn queries, exact and the engine's.
struct RowSums<'a> {
    draw: &'a Draw,
    /// Logarithms of the exact sums.
    exact: &'a [f64],
    /// `dout_i.out_i`, exact.
    delta: Vec<f64>,
    /// Logarithms of the engine's sums, corrected by `mean_change`.
    engine: Vec<f64>,
    /// By how much the exact logarithms are larger than the engine's, on average with the weights `|dout_i|^2`. Rows that
    /// were not drawn are taken to be off by as much.
    mean_change: f64,
}

impl<'a> RowSums<'a> {
    fn new(draw: &'a Draw, dout: &Mat<f64>, exact: &'a ExactRows, log_sums: &[f64]) -> Self {
        let dot = |i: usize| dout.row(i).iter().zip(exact.out.row(i).iter()).map(|(a, b)| a * b).sum();
        let engine: Vec<f64> = draw.rows.iter().map(|&row| log_sums[row]).collect();
        let (mut total, mut changes) = (0.0, 0.0);
        for (i, (exact, engine)) in exact.log_sums.iter().zip(&engine).enumerate() {
            // Rows that are taken for certain stand for no others.
            let weight = (draw.weights[i] - 1.0) * dout.row(i).squared_norm_l2();
            total += weight;
            changes += weight * (exact - engine);
        }
        let mean_change = if total > 0.0 { changes / total } else { 0.0 };
        let engine = engine.into_iter().map(|log_sum| log_sum + mean_change).collect();
        Self { draw, exact: &exact.log_sums, delta: (0..dout.nrows()).map(dot).collect(), engine, mean_change }
    }

    /// What [`unseen_row_sums`] adds, for each of the `keys`.
    fn unseen<T: Real>(
        &self,
        head: &Head<'_, T>,
        keys: &[usize],
        dout: &Mat<f64>,
        engine_delta: &[T],
    ) -> Result<Vec<[f64; 3]>> {
        let (rows, width, scale) = (&self.draw.rows, keys.len(), head.scores.scale);
        let (q, k, v) = (gather(head.q, rows)?, gather(head.k, keys)?, gather(head.v, keys)?);
        let engine_delta = collected(rows.iter().map(|&row| engine_delta[row].to_f64()), PAIRS)?;
        let squares =
            |x: &Mat<f64>, factor: f64| collected(x.row_iter().map(|row| factor * row.squared_norm_l2()), PAIRS);
        let squares = [squares(&q, scale * scale)?, squares(dout, 1.0)?];
        let (mut scores, mut upstream) = (zeroed(TILE * width, PAIRS)?, zeroed(TILE * width, PAIRS)?);
        let mut all = filled(width, [0.0; 3], PAIRS)?;
        for (first, count) in tiles(0..rows.len(), TILE) {
            let drawn = first..first + count;
            let (scores, upstream) = (&mut scores[..count * width], &mut upstream[..count * width]);
            product(view_mut(scores, count, width), q.subrows(first, count), k.transpose(), scale);
            product(view_mut(upstream, count, width), dout.subrows(first, count), v.transpose(), 1.0);
            for (&row, scores) in rows[drawn.clone()].iter().zip(scores.chunks_exact_mut(width)) {
                keys.iter().zip(scores).for_each(|(&j, s)| *s = head.score(row, j, *s));
            }
            let pairs = Pairs {
                scores,
                upstream,
                weights: &self.draw.weights[drawn.clone()],
                exact: [&self.exact[drawn.clone()], &self.delta[drawn.clone()]],
                engine: [&self.engine[drawn.clone()], &engine_delta[drawn.clone()]],
                squares: [&squares[0][drawn.clone()], &squares[1][drawn]],
            };
            unseen_row_sums(&pairs, &mut all);
        }
        Ok(all)
    }
}
