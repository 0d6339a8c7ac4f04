//! Low-rank attention under masks that its passes do not have as they are: each packed sequence is a head of its own, and a
//! causal mask from an offset on is one over as many queries as keys.
//!
//! Query `i` that sees the keys `j <= i + o` stands at position `i + o` of the keys. For `o > 0` the queries before it are
//! copies of query 0, which nobody reads; keys after the last position are left out, and positions without a key get a
//! removed one. Rows that see no key come first, and are 0.

use std::ops::Range;

use faer::{ColRef, MatRef};

use super::{Engine, Prepared};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::memory::{filled, room, zeroed};
use crate::numerics::real::Real;
use crate::problem::grads::{BiasGrads, HeadGrads, RowFactors, Upstream};
use crate::problem::heads::Head;
use crate::problem::scores::{Mask, NO_KEY_REMEDY, PairArrays};

/// What errors call copies of a head's arrays.
const COPIES: &str = "queries and keys at equal positions";

static NO_MASK: Mask = Mask::NONE;
static CAUSAL: Mask = Mask { upper: Some(0), ..Mask::NONE };

/// An engine, head after head of pieces.
#[derive(Debug)]
pub(crate) struct Pieces<T>(pub Box<dyn Engine<T>>);

/// Some queries of a head, and the keys that they see.
#[derive(Debug, Clone)]
struct Piece {
    /// Queries that see no key.
    empty: Range<usize>,
    /// Those that do.
    queries: Range<usize>,
    keys: Range<usize>,
    causal: bool,
    /// Positions before the first query.
    before: usize,
    /// Positions after the last key.
    after: usize,
}

#[derive(Debug)]
struct OfPieces<T> {
    pieces: Vec<OfPiece<T>>,
}

#[derive(Debug)]
struct OfPiece<T> {
    piece: Piece,
    /// `None` where no query sees a key.
    engine: Option<Box<dyn Prepared<T>>>,
    /// The row factors of the positions before the first query.
    before: [Vec<T>; 2],
}

impl Piece {
    /// The pieces of a head.
    fn all<T: Real>(head: &Head<'_, T>) -> Vec<Self> {
        let (n, m, upper) = (head.n(), head.m(), head.mask.upper);
        match &head.mask.starts {
            None => vec![Self::new(head, 0..n, 0..m, upper)],
            Some(starts) => {
                let ends = starts.iter().skip(1).copied().chain([n]);
                starts.iter().zip(ends).map(|(&start, end)| Self::new(head, start..end, start..end, upper)).collect()
            }
        }
    }

    /// Queries and keys, of which query `i` of the piece sees the keys `j <= i + upper`.
    fn new<T: Real>(head: &Head<'_, T>, queries: Range<usize>, keys: Range<usize>, upper: Option<isize>) -> Self {
        let first = keys.clone().find(|&key| !head.removed(key)).unwrap_or(keys.end);
        let Some(upper) = upper else {
            let seen = if first < keys.end { queries.start } else { queries.end };
            return Self::of(queries.start..seen, seen..queries.end, keys, None);
        };
        // As counted from the first key that is left.
        let upper = upper.saturating_sub((first - keys.start) as isize);
        let empty = usize::try_from(upper.saturating_neg()).unwrap_or(0);
        let empty = if first == keys.end { queries.len() } else { empty.min(queries.len()) };
        let seen = queries.start + empty;
        Self::of(queries.start..seen, seen..queries.end, first..keys.end, Some(usize::try_from(upper).unwrap_or(0)))
    }

    fn of(empty: Range<usize>, queries: Range<usize>, keys: Range<usize>, offset: Option<usize>) -> Self {
        let whole = Self { empty, queries, keys, causal: false, before: 0, after: 0 };
        match offset {
            Some(before) if before < whole.keys.len() => {
                let positions = before + whole.queries.len();
                let keys = whole.keys.start..whole.keys.end.min(whole.keys.start + positions);
                let after = positions - keys.len();
                Self { keys, causal: true, before, after, ..whole }
            }
            _ => whole,
        }
    }

    fn positions(&self) -> usize {
        self.before + self.queries.len()
    }

    /// Calls `f` with the piece as a head.
    fn with<T: Real, R>(&self, head: &Head<'_, T>, f: impl FnOnce(&Head<'_, T>) -> Result<R>) -> Result<R> {
        let (q, k, v) =
            (self.rows(head.q, &self.queries), self.rows(head.k, &self.keys), self.rows(head.v, &self.keys));
        let key_bias = head.key_bias.map(|bias| bias.subrows(self.keys.start, self.keys.len()));
        let mask = if self.causal { &CAUSAL } else { &NO_MASK };
        let pairs = PairArrays { allowed: None, bias: None };
        let view = Head { q, k, v, key_bias, pairs, sink: None, mask, ..*head };
        let named = |error| match error {
            Error::Denominator(text) if self.queries.start > 0 || self.before > 0 => Error::Denominator(format!(
                "{text} (of rows counted from {} on)",
                self.queries.start as isize - self.before as isize
            )),
            other => other,
        };
        if self.before == 0 && self.after == 0 {
            return f(&view).map_err(named);
        }
        let query = |i: usize| q.row(i.saturating_sub(self.before));
        let padded_q = flat((0..self.positions()).map(query), self.positions() * q.ncols())?;
        let padded = |x: MatRef<'_, T>| -> Result<Vec<T>> {
            let mut rows = flat(x.row_iter(), (x.nrows() + self.after) * x.ncols())?;
            rows.resize((x.nrows() + self.after) * x.ncols(), T::ZERO);
            Ok(rows)
        };
        let (padded_k, padded_v) = (padded(k)?, padded(v)?);
        let mut biases = zeroed::<T>(if self.after > 0 || key_bias.is_some() { self.positions() } else { 0 }, COPIES)?;
        biases.iter_mut().skip(self.keys.len()).for_each(|bias| *bias = T::NEG_INFINITY);
        if let Some(given) = key_bias {
            biases.iter_mut().zip(given.iter()).for_each(|(to, bias)| *to = *bias);
        }
        let rows = |x, width| MatRef::from_row_major_slice(x, self.positions(), width);
        let padded = Head {
            q: rows(&padded_q, q.ncols()),
            k: rows(&padded_k, k.ncols()),
            v: rows(&padded_v, v.ncols()),
            key_bias: (!biases.is_empty()).then(|| ColRef::from_slice(&biases)),
            ..view
        };
        f(&padded).map_err(named)
    }

    fn rows<'a, T>(&self, x: MatRef<'a, T>, rows: &Range<usize>) -> MatRef<'a, T> {
        x.subrows(rows.start, rows.len())
    }
}

/// Rows, one after another.
fn flat<'a, T: Real>(rows: impl Iterator<Item = faer::RowRef<'a, T>>, count: usize) -> Result<Vec<T>> {
    let mut all = room(count, COPIES)?;
    rows.for_each(|row| all.extend(row.iter().copied()));
    Ok(all)
}

/// `before` numbers, and after them those of the piece.
fn after<T: Real>(before: &[T], x: &[T]) -> Result<Vec<T>> {
    let mut all = room(before.len() + x.len(), COPIES)?;
    all.extend_from_slice(before);
    all.extend_from_slice(x);
    Ok(all)
}

impl<T: Real> Engine<T> for Pieces<T> {
    fn prepare(&self, ctx: &Context, head: &Head<'_, T>) -> Result<Box<dyn Prepared<T>>> {
        let prepared = |piece: Piece| {
            let engine = match piece.queries.is_empty() {
                true => None,
                false => Some(piece.with(head, |head| self.0.prepare(ctx, head))?),
            };
            Ok(OfPiece { piece, engine, before: [Vec::new(), Vec::new()] })
        };
        Ok(Box::new(OfPieces { pieces: Piece::all(head).into_iter().map(prepared).collect::<Result<_>>()? }))
    }
}

impl<T: Real> Prepared<T> for OfPieces<T> {
    fn name(&self) -> String {
        self.pieces.iter().find_map(|of| of.engine.as_ref()).map_or_else(|| "no rows".into(), |engine| engine.name())
    }

    fn forward(
        &mut self,
        ctx: &Context,
        head: &Head<'_, T>,
        out: &mut [T],
        row_max: &mut [T],
        row_scale: &mut [T],
    ) -> Result<()> {
        let d_v = head.d_v();
        for OfPiece { piece, engine, before } in &mut self.pieces {
            if let Some(row) = piece.empty.clone().find(|&row| !head.may_be_empty(row)) {
                return Err(Error::Denominator(format!(
                    "row {row} of head {} has no key to attend to; {NO_KEY_REMEDY}",
                    head.index
                )));
            }
            let empty = piece.empty.clone();
            out[empty.start * d_v..empty.end * d_v].fill(T::ZERO);
            row_max[empty.clone()].fill(T::ZERO);
            row_scale[empty].fill(T::ZERO);
            let Some(engine) = engine else { continue };
            let rows = piece.queries.clone();
            let out = &mut out[rows.start * d_v..rows.end * d_v];
            let (max, scale) = (&mut row_max[rows.clone()], &mut row_scale[rows]);
            piece.with(head, |head| {
                if piece.before == 0 {
                    return engine.forward(ctx, head, out, max, scale);
                }
                let mut all = zeroed(piece.positions() * d_v, COPIES)?;
                let mut factors = [zeroed(piece.positions(), COPIES)?, zeroed(piece.positions(), COPIES)?];
                let [all_max, all_scale] = &mut factors;
                engine.forward(ctx, head, &mut all, all_max, all_scale)?;
                out.copy_from_slice(&all[piece.before * d_v..]);
                max.copy_from_slice(&all_max[piece.before..]);
                scale.copy_from_slice(&all_scale[piece.before..]);
                factors.iter_mut().for_each(|x| x.truncate(piece.before));
                *before = factors;
                Ok(())
            })?;
        }
        Ok(())
    }

    fn backward(
        &self,
        ctx: &Context,
        head: &Head<'_, T>,
        up: Upstream<'_, T>,
        grads: HeadGrads<'_, T>,
        _: Option<BiasGrads<'_, T>>,
    ) -> Result<()> {
        let (d, d_v) = (head.d(), head.d_v());
        let HeadGrads { dq, dk, dv, mut dkey_bias } = grads;
        dq.fill(T::ZERO);
        for of in &self.pieces {
            let (piece, Some(engine)) = (&of.piece, &of.engine) else { continue };
            let (rows, keys) = (piece.queries.clone(), piece.keys.clone());
            let dq = &mut dq[rows.start * d..rows.end * d];
            let (dk, dv) = (&mut dk[keys.start * d..keys.end * d], &mut dv[keys.start * d_v..keys.end * d_v]);
            let db = dkey_bias.as_deref_mut().map(|db| &mut db[keys]);
            let (max, scale, delta) =
                (&up.rows.max[rows.clone()], &up.rows.scale[rows.clone()], &up.delta[rows.clone()]);
            let dout = piece.rows(up.dout, &rows);
            piece.with(head, |head| {
                if piece.before == 0 && piece.after == 0 {
                    let up = Upstream { dout, delta, rows: RowFactors { max, scale } };
                    let grads = HeadGrads { dq, dk, dv, dkey_bias: db };
                    return engine.backward(ctx, head, up, grads, None);
                }
                let [before_max, before_scale] = &of.before;
                let (max, scale) = (after(before_max, max)?, after(before_scale, scale)?);
                let delta = after(&zeroed(piece.before, COPIES)?, delta)?;
                let mut all_dout = zeroed(piece.before * d_v, COPIES)?;
                all_dout.extend(flat(dout.row_iter(), rows.len() * d_v)?);
                let zeros = |width: usize| zeroed::<T>(piece.positions() * width, COPIES);
                let (mut all_q, mut all_k, mut all_v) = (zeros(d)?, zeros(d)?, zeros(d_v)?);
                let mut all_b = db.as_ref().map(|_| zeros(1)).transpose()?;
                engine.backward(
                    ctx,
                    head,
                    Upstream {
                        dout: MatRef::from_row_major_slice(&all_dout, piece.positions(), d_v),
                        delta: &delta,
                        rows: RowFactors { max: &max, scale: &scale },
                    },
                    HeadGrads { dq: &mut all_q, dk: &mut all_k, dv: &mut all_v, dkey_bias: all_b.as_deref_mut() },
                    None,
                )?;
                dq.copy_from_slice(&all_q[piece.before * d..]);
                let add = |to: &mut [T], x: &[T]| to.iter_mut().zip(x).for_each(|(to, x)| *to += *x);
                add(dk, &all_k);
                add(dv, &all_v);
                if let (Some(db), Some(all)) = (db, &all_b) {
                    add(db, all);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn log_row_sums(&self, head: &Head<'_, T>, rows: RowFactors<'_, T>) -> Result<Vec<f64>> {
        let mut all = filled(head.n(), f64::NEG_INFINITY, "logarithms of row sums")?;
        for of in &self.pieces {
            let (piece, Some(engine)) = (&of.piece, &of.engine) else { continue };
            let [before_max, before_scale] = &of.before;
            let max = after(before_max, &rows.max[piece.queries.clone()])?;
            let scale = after(before_scale, &rows.scale[piece.queries.clone()])?;
            let sums = piece.with(head, |head| engine.log_row_sums(head, RowFactors { max: &max, scale: &scale }))?;
            all[piece.queries.clone()].copy_from_slice(&sums[piece.before..]);
        }
        Ok(all)
    }
}
