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

use pulp::{Arch, Simd, WithSimd};

use crate::error::Result;
use crate::memory::room;
use crate::numerics::real::{Real, vectorised};

/// The tree of the monomials of `d` variables up to some degree, in order of degree.
#[derive(Debug, Clone)]
pub(crate) struct Monomials {
    /// `(parent, variable)` of each monomial but the constant one.
    links: Vec<(u32, u32)>,
    /// Where the children of each monomial below the highest degree start; they are consecutive. One more entry.
    children: Vec<u32>,
    /// `j!/α!`.
    multinomials: Vec<f64>,
    /// Number of monomials of degree at most `j`.
    ranks: Vec<usize>,
}

/// Features of the highest degree that are formed at a time: enough for a fast product, few enough to stay in the
/// cache.
///
/// Strides of tiles are no powers of two, whose rows would all share a few places in the cache.
pub(crate) const PIECE: usize = 144;
/// Features that are formed at once, whatever their degrees.
const FEW: usize = 160;
/// Length of a row of them, with what vectors may run into.
pub(crate) const PIECE_WIDTH: usize = PIECE + Monomials::OVERRUN;
/// Beyond this not even one variable makes sense.
const LARGEST_DEGREE: usize = 1 << 20;

/// Consecutive children of one parent: `feature = parent x_variable`, `variable` counting up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    parent: u32,
    /// Of the first.
    variable: u32,
    /// The first child's place in the piece.
    at: u32,
    count: u32,
}

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
    pub fn new(d: usize, degree: usize) -> Result<Self> {
        const WHAT: &str = "a tree of monomials";
        let (r, parents) = (rank(d, degree).unwrap_or(0), rank(d, degree.saturating_sub(1)).unwrap_or(0));
        let (mut links, mut multinomials) = (room(r, WHAT)?, room(r, WHAT)?);
        // How often the last variable stands in the monomial.
        let mut repeats = room(r, WHAT)?;
        let (mut ranks, mut children) = (room(degree + 1, WHAT)?, room(parents + 1, WHAT)?);
        links.push((0, 0));
        multinomials.push(1.0);
        repeats.push(0u32);
        ranks.push(1);
        let mut previous = 0..1;
        for j in 1..=degree {
            for parent in previous.clone() {
                let (_, last): (u32, u32) = links[parent];
                children.push(links.len() as u32);
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
        children.push(links.len() as u32);
        Ok(Self { links, children, multinomials, ranks })
    }

    /// Runs of children that a tile's features up to `degree` are formed in at once, at the most.
    pub fn most_runs(&self, degree: usize) -> usize {
        self.ranks[self.low_degree(degree).saturating_sub(1)].max(PIECE)
    }

    /// Number of monomials of degree at most `degree`.
    pub fn rank(&self, degree: usize) -> usize {
        self.ranks[degree]
    }

    fn variables(&self) -> usize {
        self.ranks.get(1).map_or(0, |r| r - 1)
    }

    /// What multiplies `q^α k^α` in `sum_j coefficients_j (scale q.k)^j`, for every `α`.
    pub fn weights(&self, coefficients: &[f64], scale: f64) -> Result<Vec<f64>> {
        let mut weights = room(self.ranks[coefficients.len() - 1], "weights of monomials")?;
        for (j, a) in coefficients.iter().enumerate() {
            let factor = a * scale.powi(j as i32);
            let of_degree = weights.len()..self.ranks[j];
            weights.extend(self.multinomials[of_degree].iter().map(|m| m * factor));
        }
        Ok(weights)
    }

    /// The degree up to which the features of degree at most `degree` are formed at once: those of less, or all where
    /// they are few.
    pub fn low_degree(&self, degree: usize) -> usize {
        if self.ranks[degree] <= FEW { degree } else { degree - 1 }
    }

    /// The features of degree at most `degree` in pieces of consecutive ones: those up to
    /// [`low_degree`](Self::low_degree), then the others, [`PIECE`] at a time.
    pub fn pieces(&self, degree: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (low, r) = (self.ranks[self.low_degree(degree)], self.ranks[degree]);
        std::iter::once(0..low).chain((low..r).step_by(PIECE).map(move |start| start..(start + PIECE).min(r)))
    }

    /// The runs of children that make up a range of features, without the constant one.
    fn runs(&self, features: Range<usize>) -> impl Iterator<Item = Run> {
        let first = self.links[features.start].0 as usize;
        (first..self.children.len() - 1)
            .map(move |parent| {
                let (start, end) = (self.children[parent], self.children[parent + 1]);
                let from = (start as usize).max(features.start);
                Run {
                    parent: parent as u32,
                    variable: self.links[from].1,
                    at: (from - features.start) as u32,
                    count: (end as usize).min(features.end).saturating_sub(from) as u32,
                }
            })
            .take_while(|run| run.count > 0)
    }

    /// Writes the features of a tile up to `degree`: `x` is `(d, len)`, `f` `(r, len)`.
    pub fn features<T: Real>(&self, x: &[T], len: usize, degree: usize, f: &mut [T]) {
        f[..len].fill(T::ONE);
        for j in 1..=degree {
            let level = self.ranks[j - 1]..self.ranks[j];
            let (low, f) = f.split_at_mut(level.start * len);
            self.piece(x, low, len, level, f);
        }
    }

    /// Writes a piece of the features of one degree, from those of less.
    pub fn piece<T: Real>(&self, x: &[T], low: &[T], len: usize, piece: Range<usize>, f: &mut [T]) {
        vectorised(
            #[inline(always)]
            || {
                for (&(parent, variable), f) in self.links[piece].iter().zip(f.chunks_exact_mut(len)) {
                    let parent = &low[parent as usize * len..][..len];
                    let x = &x[variable as usize * len..][..len];
                    for ((f, &p), &x) in f.iter_mut().zip(parent).zip(x) {
                        *f = p * x;
                    }
                }
            },
        );
    }

    /// Adds to `dx`, `(d, len)`, and to the gradient `dlow` of the features of lower degree what a piece of one degree
    /// with the gradient `df` gives them.
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
        let parents = (self.links[piece.end - 1].0 as usize + 1) * len;
        let variables = self.variables() * len;
        assert!(df.len() >= piece.len() * len && low.len() >= parents && dlow.len() >= parents, "a tile's features");
        assert!(x.len() >= variables && dx.len() >= variables, "a tile's variables");
        let (x, low, df) = (x.as_ptr(), low.as_ptr(), df.as_ptr());
        let (dlow, dx) = (dlow.as_mut_ptr(), dx.as_mut_ptr());
        Arch::new().dispatch(Pull { runs: self.runs(piece), len, x, low, df, dlow, dx });
    }

    /// Adds `J^T df` to `dx`, `(d, len)`, for the gradient `df` of the features up to `degree`, which it destroys. Of
    /// `f` only the features of less than that degree are read.
    pub fn pullback<T: Real>(&self, x: &[T], f: &[T], len: usize, degree: usize, df: &mut [T], dx: &mut [T]) {
        for j in (1..=degree).rev() {
            let level = self.ranks[j - 1]..self.ranks[j];
            let (dlow, df) = df.split_at_mut(level.start * len);
            self.pullback_piece(x, f, len, level, df, dlow, dx);
        }
    }

    /// Numbers behind the variables of a row, and the features of one, that vectors may run into.
    pub const OVERRUN: usize = 16;

    /// Writes the features up to [`low_degree`](Self::low_degree), each token's in a row of
    /// [`low_width`](Self::low_width). Rows of `x` are `width` long, with [`OVERRUN`](Self::OVERRUN) numbers behind the
    /// variables. `runs` is room to work in.
    pub fn low_rows<T: Real>(
        &self,
        x: &[T],
        width: usize,
        len: usize,
        degree: usize,
        low: &mut [T],
        runs: &mut Vec<Run>,
    ) {
        let (r, low_width) = (self.ranks[self.low_degree(degree)], self.low_width(degree));
        assert!(low.len() >= len * low_width && x.len() >= len * width, "a tile's rows");
        assert!(width >= self.variables() + Self::OVERRUN, "a row's end");
        runs.clear();
        if r > 1 {
            runs.extend(self.runs(1..r).map(|run| Run { at: run.at + 1, ..run }));
        }
        let (x, f) = (x.as_ptr(), low.as_mut_ptr());
        Arch::new().dispatch(FormRows { runs, first: true, len, x, width, low: f, low_width, f, f_width: low_width });
    }

    /// Length of a row of features up to [`low_degree`](Self::low_degree), with what vectors may run into.
    pub fn low_width(&self, degree: usize) -> usize {
        self.ranks[self.low_degree(degree)] + Self::OVERRUN
    }

    /// Writes a piece of the features of `degree` in rows of [`PIECE_WIDTH`], from those that
    /// [`low_rows`](Self::low_rows) wrote.
    pub fn piece_rows<T: Real>(
        &self,
        x: &[T],
        width: usize,
        low: &[T],
        len: usize,
        degree: usize,
        piece: Range<usize>,
        f: &mut [T],
        runs: &mut Vec<Run>,
    ) {
        let (level, low_width) = (self.ranks[degree - 1]..self.ranks[degree], self.low_width(degree));
        assert!(
            level.contains(&piece.start) && piece.end <= level.end && piece.len() <= PIECE,
            "a piece of one degree"
        );
        assert!(
            f.len() >= len * PIECE_WIDTH && low.len() >= len * low_width && x.len() >= len * width,
            "a tile's rows"
        );
        assert!(width >= self.variables() + Self::OVERRUN, "a row's end");
        runs.clear();
        runs.extend(self.runs(piece));
        let (x, low, f) = (x.as_ptr(), low.as_ptr(), f.as_mut_ptr());
        let f_width = PIECE_WIDTH;
        Arch::new().dispatch(FormRows { runs, first: false, len, x, width, low, low_width, f, f_width });
    }
}

/// The features of `runs`. Vectors run over the end of a run into what is written after it, and over the end of a row
/// into its slack.
struct FormRows<'a, T> {
    runs: &'a [Run],
    /// Whether the constant feature comes first.
    first: bool,
    len: usize,
    x: *const T,
    width: usize,
    low: *const T,
    low_width: usize,
    f: *mut T,
    f_width: usize,
}

impl<T: Real> WithSimd for FormRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        assert!(T::lanes::<S>() <= Monomials::OVERRUN, "a vector fits behind a row");
        let mut t = 0;
        // SAFETY: whoever makes this sees to it that each row of x has `OVERRUN` numbers behind its variables and each
        // row of f as many behind its features, that a run's parents are in low and its variables in x. A vector is no
        // longer than that.
        unsafe {
            while t + GROUP <= self.len {
                self.rows::<S, GROUP>(simd, t);
                t += GROUP;
            }
            while t < self.len {
                self.rows::<S, 1>(simd, t);
                t += 1;
            }
        }
    }
}

/// Tokens whose features are formed side by side.
const GROUP: usize = 4;

impl<T: Real> FormRows<'_, T> {
    /// # Safety
    /// As for the whole.
    #[inline(always)]
    unsafe fn rows<S: Simd, const COUNT: usize>(&self, simd: S, t: usize) {
        let lanes = T::lanes::<S>();
        // SAFETY: as the caller promises.
        unsafe {
            let (x, low, f) =
                (self.x.add(t * self.width), self.low.add(t * self.low_width), self.f.add(t * self.f_width));
            if self.first {
                (0..COUNT).for_each(|i| *f.add(i * self.f_width) = T::ONE);
            }
            for run in self.runs {
                let low = low.add(run.parent as usize);
                let parents: [_; COUNT] = std::array::from_fn(|i| T::splat(simd, *low.add(i * self.low_width)));
                let (x, f) = (x.add(run.variable as usize), f.add(run.at as usize));
                let mut done = 0;
                while done < run.count as usize {
                    for (i, &parent) in parents.iter().enumerate() {
                        let x = T::load(simd, x.add(i * self.width + done));
                        T::store(simd, f.add(i * self.f_width + done), T::multiply(simd, parent, x));
                    }
                    done += lanes;
                }
            }
        }
    }
}

/// `dlow += sum over a run of df x`, `dx += df low`, tokens along the lanes.
struct Pull<I, T> {
    runs: I,
    len: usize,
    x: *const T,
    low: *const T,
    df: *const T,
    dlow: *mut T,
    dx: *mut T,
}

impl<I: Iterator<Item = Run>, T: Real> WithSimd for Pull<I, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { runs, len, x, low, df, dlow, dx } = self;
        let lanes = T::lanes::<S>();
        for run in runs {
            // SAFETY: whoever makes this sees to it that the run's parent and variables, and its place in df, lie
            // within the tiles, whose rows are `len` long.
            unsafe {
                let (low, dlow) = (low.add(run.parent as usize * len), dlow.add(run.parent as usize * len));
                let first = run.variable as usize * len;
                let (x, dx, df) = (x.add(first), dx.add(first), df.add(run.at as usize * len));
                let mut t = 0;
                while t + lanes <= len {
                    let parent = T::load(simd, low.add(t));
                    let mut sum = T::load(simd, dlow.add(t));
                    for child in 0..run.count as usize {
                        let at = child * len + t;
                        let g = T::load(simd, df.add(at));
                        sum = T::multiply_add(simd, g, T::load(simd, x.add(at)), sum);
                        T::store(simd, dx.add(at), T::multiply_add(simd, g, parent, T::load(simd, dx.add(at))));
                    }
                    T::store(simd, dlow.add(t), sum);
                    t += lanes;
                }
                for t in t..len {
                    let mut sum = *dlow.add(t);
                    for child in 0..run.count as usize {
                        let at = child * len + t;
                        sum += *df.add(at) * *x.add(at);
                        *dx.add(at) += *df.add(at) * *low.add(t);
                    }
                    *dlow.add(t) = sum;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree_of(d: usize, degree: usize) -> Monomials {
        Monomials::new(d, degree).expect("room for a small tree")
    }

    #[test]
    fn ranks_are_binomials() {
        assert_eq!(rank(16, 2), Some(153));
        assert_eq!(rank(16, 4), Some(4845));
        assert_eq!(rank(64, 2), Some(2145));
        assert_eq!(rank(64, 20), None);
        assert_eq!(tree_of(16, 4).rank(4), 4845);
        assert_eq!(tree_of(1, 3).rank(3), 4);
    }

    #[test]
    fn weighted_features_sum_to_the_polynomial_of_the_inner_product() {
        let (d, len, scale) = (5, 3, 0.7);
        let coefficients = [0.3, -1.0, 0.5, 0.25, 2.0];
        let tree = tree_of(d, 4);
        let r = tree.rank(4);
        let number = |i: usize| ((i * 37 % 19) as f64 - 9.0) / 7.0;
        let q: Vec<f64> = (0..d * len).map(number).collect();
        let k: Vec<f64> = (0..d * len).map(|i| number(i + 5)).collect();
        let (mut fq, mut fk) = (vec![f64::NAN; r * len], vec![f64::NAN; r * len]);
        tree.features(&q, len, 4, &mut fq);
        tree.features(&k, len, 4, &mut fk);
        let weights = tree.weights(&coefficients, scale).expect("room for a few weights");
        for t in 0..len {
            let s: f64 = scale * (0..d).map(|c| q[c * len + t] * k[c * len + t]).sum::<f64>();
            let expected: f64 = coefficients.iter().enumerate().map(|(j, a)| a * s.powi(j as i32)).sum();
            let got: f64 = (0..r).map(|a| weights[a] * fq[a * len + t] * fk[a * len + t]).sum();
            assert!((got - expected).abs() <= 1e-12 * expected.abs().max(1.0), "{got} {expected}");
        }
    }

    #[test]
    fn features_in_rows_are_those_in_columns() {
        // One variable, few features, several pieces, one feature below the degree; whole groups of tokens and not.
        for (d, degree, len) in [(1, 3, 1), (5, 2, 3), (16, 3, 7), (200, 1, 5), (12, 4, 8)] {
            let tree = tree_of(d, degree);
            let r = tree.rank(degree);
            let (width, low_width) = (d + Monomials::OVERRUN, tree.low_width(degree));
            let mut rows = vec![0.0; len * width];
            for t in 0..len {
                (0..d).for_each(|c| rows[t * width + c] = ((t * 31 + c * 17) % 23) as f64 / 8.0 - 1.0);
            }
            let columns: Vec<f64> = (0..d * len).map(|i| rows[i % len * width + i / len]).collect();
            let mut expected = vec![f64::NAN; r * len];
            tree.features(&columns, len, degree, &mut expected);
            let (mut low, mut f) = (vec![f64::NAN; len * low_width], vec![f64::NAN; len * PIECE_WIDTH]);
            let mut runs = Vec::new();
            tree.low_rows(&rows, width, len, degree, &mut low, &mut runs);
            for piece in tree.pieces(degree) {
                let (got, got_width) = if piece.start == 0 {
                    (&low, low_width)
                } else {
                    tree.piece_rows(&rows, width, &low, len, degree, piece.clone(), &mut f, &mut runs);
                    (&f, PIECE_WIDTH)
                };
                for (a, t) in piece.clone().flat_map(|a| (0..len).map(move |t| (a, t))) {
                    assert_eq!(got[t * got_width + a - piece.start], expected[a * len + t], "d = {d}, feature {a}");
                }
            }
        }
    }

    #[test]
    fn pullback_matches_central_differences() {
        let (d, degree) = (7, 4); // with pieces beyond the features of low degree
        let tree = tree_of(d, degree);
        let r = tree.rank(degree);
        let x: Vec<f64> = vec![0.3, -0.8, 1.1, 0.5, -0.2, 0.9, -0.6];
        let u: Vec<f64> = (0..r).map(|a| ((a * 7 % 11) as f64 - 5.0) / 3.0).collect();
        let value = |x: &[f64]| -> f64 {
            let mut f = vec![0.0; r];
            tree.features(x, 1, degree, &mut f);
            f.iter().zip(&u).map(|(f, u)| f * u).sum()
        };
        let mut f = vec![0.0; r];
        tree.features(&x, 1, degree, &mut f);
        let mut dx = vec![0.0; d];
        tree.pullback(&x, &f, 1, degree, &mut u.clone(), &mut dx);
        let low = tree.rank(tree.low_degree(degree));
        assert!(low < r);
        let (mut by_pieces, mut dlow) = (vec![0.0; d], u[..low].to_vec());
        for piece in tree.pieces(degree).skip(1) {
            let mut top = vec![f64::NAN; piece.len()];
            tree.piece(&x, &f[..low], 1, piece.clone(), &mut top);
            assert_eq!(top, f[piece.clone()]);
            tree.pullback_piece(&x, &f[..low], 1, piece.clone(), &u[piece], &mut dlow, &mut by_pieces);
        }
        tree.pullback(&x, &f[..low], 1, degree - 1, &mut dlow, &mut by_pieces);
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
