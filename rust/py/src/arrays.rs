//! NumPy arrays as the core's strided views, and new arrays for its results.

use std::borrow::Cow;

use half::{bf16, f16};
use lingrad_core::memory::collected;
use lingrad_core::{ColRef, Error, MatRef, Real, Rows, Stored};
use numpy::prelude::*;
use numpy::{Element, PyArrayDyn, PyUntypedArray, get_array_module};
use pyo3::prelude::*;

use crate::error::{DtypeError, Result, ShapeError, no_memory};

/// `f32` or `f64`, to both NumPy and the core.
pub trait Scalar: Real + Item {}
impl Scalar for f32 {}
impl Scalar for f64 {}

/// What arrays hold that are only read.
pub trait Item: Element + Copy {}
impl Item for f32 {}
impl Item for f64 {}
impl Item for bool {}
impl Item for f16 {}
impl Item for bf16 {}

/// float16 or bfloat16, to both NumPy and the core.
pub trait Half: Item + Stored<f32> {}
impl Half for f16 {}
impl Half for bf16 {}

/// An argument whose element type is not known yet.
pub type Any<'a, 'py> = &'a Bound<'py, PyUntypedArray>;

/// The body, compiled with the type `T` for each dtype, and run for that of the array.
macro_rules! by_dtype {
    ($array:expr, $T:ident => $body:block) => {
        if $array.cast::<numpy::PyArrayDyn<f32>>().is_ok() {
            type $T = f32;
            $body
        } else {
            type $T = f64;
            $body
        }
    };
}
pub(crate) use by_dtype;

/// The same for float32, float64 and the types of half precision, for which there is a body of its own.
macro_rules! by_any_dtype {
    ($array:expr, $T:ident => $body:block, half $H:ident => $half:block) => {
        match $crate::arrays::half_of($array) {
            Some($crate::arrays::HalfType::F16) => {
                type $H = half::f16;
                $half
            }
            Some($crate::arrays::HalfType::Bf16) => {
                type $H = half::bf16;
                $half
            }
            None => $crate::arrays::by_dtype!($array, $T => $body),
        }
    };
}
pub(crate) use by_any_dtype;

/// The types of half precision.
pub enum HalfType {
    F16,
    Bf16,
}

/// Which of them an array holds.
pub fn half_of(array: Any<'_, '_>) -> Option<HalfType> {
    let dtype = array.dtype();
    match (dtype.itemsize(), dtype.kind()) {
        (2, b'f') => Some(HalfType::F16),
        // NumPy knows bfloat16 by name once `ml_dtypes` has told it: there is an array of it, or of none.
        (2, b'V' | b'E') => array.cast::<PyArrayDyn<bf16>>().is_ok().then_some(HalfType::Bf16),
        _ => None,
    }
}

/// An array argument that the core can read in place.
pub struct View<'py, T: Item> {
    name: &'static str,
    array: Bound<'py, PyArrayDyn<T>>,
    /// In elements; 0 along axes of at most one entry, whose stride means nothing.
    strides: Vec<isize>,
}

impl<'py, T: Item> View<'py, T> {
    /// `array`, if its dtype is `T` and its layout one that pointers to `T` can walk.
    pub fn new(name: &'static str, array: Any<'_, 'py>) -> Result<Self> {
        let array = array
            .cast::<PyArrayDyn<T>>()
            .map_err(|_| {
                let expected = numpy::dtype::<T>(array.py());
                DtypeError::new_err(format!("{name} has dtype {}; expected {expected}", array.dtype()))
            })?
            .clone();
        let size = size_of::<T>() as isize;
        let strides: Vec<isize> = (array.shape().iter().zip(array.strides()))
            .map(|(&len, &stride)| if len > 1 { stride } else { 0 })
            .collect();
        if !array.is_aligned() || strides.iter().any(|stride| stride % size != 0) {
            return Err(DtypeError::new_err(format!(
                "{name} is not aligned to its item size of {size} bytes; expected an aligned array (copy it)"
            ))
            .into());
        }
        Ok(Self { name, array, strides: strides.iter().map(|stride| stride / size).collect() })
    }

    /// The lengths of all axes.
    pub fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    /// Number of rows and columns, once the leading axes are set aside.
    pub fn rows_and_columns(&self) -> Result<(usize, usize)> {
        match self.shape() {
            [.., rows, columns] => Ok((*rows, *columns)),
            shape => Err(self.shape_error(shape, "(..., rows, columns)")),
        }
    }

    /// All axes but the last two.
    pub fn leading(&self) -> &[usize] {
        &self.shape()[..self.shape().len().saturating_sub(2)]
    }

    /// One matrix for every index of the leading axes.
    pub fn matrices(&self) -> Result<Vec<MatRef<'_, T>>> {
        let (rows, columns) = self.rows_and_columns()?;
        let [.., row_stride, column_stride] = self.strides[..] else {
            return Err(self.shape_error(self.shape(), "(..., rows, columns)"));
        };
        // SAFETY: NumPy vouches that every index within `shape` lies, by `strides`, inside the array's memory, which
        // `self.array` keeps alive; pointer and strides are aligned (checked in `new`).
        self.views(2, |at| unsafe { MatRef::from_raw_parts(at, rows, columns, row_stride, column_stride) })
    }

    /// The one matrix of a 2-D array.
    pub fn matrix(&self) -> Result<MatRef<'_, T>> {
        match self.matrices()?[..] {
            [matrix] if self.shape().len() == 2 => Ok(matrix),
            _ => Err(self.shape_error(self.shape(), "(rows, columns)")),
        }
    }

    /// A matrix, or a vector as a matrix of one row.
    pub fn matrix_or_row(&self) -> Result<MatRef<'_, T>> {
        match self.columns()?[..] {
            [column] if self.shape().len() == 1 => Ok(column.transpose().as_mat()),
            _ => self.matrix(),
        }
    }

    /// One vector for every index of the axes before the last.
    pub fn columns(&self) -> Result<Vec<ColRef<'_, T>>> {
        let ([.., len], [.., stride]) = (self.shape(), &self.strides[..]) else {
            return Err(self.shape_error(self.shape(), "(..., entries)"));
        };
        // SAFETY: as in `matrices`.
        self.views(1, |at| unsafe { ColRef::from_raw_parts(at, *len, *stride) })
    }

    /// The entries of a 1-D array.
    pub fn vector(&self) -> Result<Vec<T>> {
        match self.columns()?[..] {
            [column] if self.shape().len() == 1 => Ok(collected(column.iter().copied(), "a copy of a vector")?),
            _ => Err(self.shape_error(self.shape(), "(entries,)")),
        }
    }

    /// All entries, in C order.
    pub fn numbers(&self) -> Result<Vec<T>> {
        Ok(self.columns()?.iter().flat_map(|column| column.iter().copied()).collect())
    }

    /// The same, where they lie if they do so in that order.
    pub fn contiguous(&self) -> Result<Cow<'_, [T]>> {
        let mut step = 1;
        let in_order = self.shape().iter().zip(&self.strides).rev().all(|(&len, &stride)| {
            let fits = len <= 1 || stride == step;
            step *= len as isize;
            fits
        });
        if in_order && !self.shape().contains(&0) {
            // SAFETY: as in `matrices`; the entries follow each other without a gap.
            return Ok(Cow::Borrowed(unsafe { std::slice::from_raw_parts(self.array.data(), step as usize) }));
        }
        self.numbers().map(Cow::Owned)
    }

    /// The array as a batch of sequences.
    pub fn rows(&self) -> Result<Rows<'_, T>> {
        let (n, d) = self.rows_and_columns()?;
        Ok(Rows::new(self.matrices()?, n, d)?)
    }

    /// A view for each entry of the axes before the last `inner`, in C order, from where it begins.
    fn views<V>(&self, inner: usize, view: impl Fn(*const T) -> V) -> Result<Vec<V>> {
        let outer = &self.shape()[..self.shape().len().saturating_sub(inner)];
        let at = |mut index: usize| {
            let mut offset = 0;
            for (len, stride) in outer.iter().zip(&self.strides).rev() {
                offset += (index % len) as isize * stride;
                index /= len;
            }
            // Wrapping: where an inner axis is empty, NumPy promises nothing about the rest.
            view(self.array.data().cast_const().wrapping_offset(offset))
        };
        let views = size(outer).map(|count| collected((0..count).map(at), "views of an array"));
        match views {
            Some(Ok(views)) => Ok(views),
            Some(Err(Error::Memory { bytes, .. })) => {
                let text = format!("no memory for views of the matrices of {}: {bytes} bytes", self.name);
                Err(no_memory(text))
            }
            Some(Err(_)) | None => Err(self.shape_error(self.shape(), "no more matrices than memory has room to list")),
        }
    }

    fn shape_error(&self, shape: &[usize], expected: &str) -> crate::error::Failure {
        ShapeError::new_err(format!("{} has shape {shape:?}; expected {expected}", self.name)).into()
    }
}

/// The number of entries of an array, if there can be so many. As NumPy has it, axes of no entries do not make room for
/// others.
pub fn size(shape: &[usize]) -> Option<usize> {
    let others = shape
        .iter()
        .filter(|len| **len > 0)
        .try_fold(1isize, |size, len| size.checked_mul(isize::try_from(*len).ok()?));
    if shape.contains(&0) { others.and(Some(0)) } else { others.map(isize::unsigned_abs) }
}

/// `leading` followed by `last`.
pub fn joined(leading: &[usize], last: &[usize]) -> Vec<usize> {
    [leading, last].concat()
}

/// A new array of zeros.
pub struct Output<'py, T: Item>(Bound<'py, PyArrayDyn<T>>);

impl<'py, T: Item> Output<'py, T> {
    /// Zeros of the given shape; `MemoryError` where there is no room (rust-numpy would panic). A shape that no array has
    /// is an error of its own: NumPy's is a plain `ValueError`.
    pub fn new(py: Python<'py>, shape: &[usize]) -> Result<Self> {
        let itemsize = size_of::<T>();
        if size(&joined(shape, &[itemsize])).is_none() {
            let text =
                format!("a result would have shape {shape:?} of {itemsize} bytes each, more than memory can have");
            return Err(ShapeError::new_err(text).into());
        }
        let zeros = get_array_module(py)?.call_method1("zeros", (shape.to_vec(), numpy::dtype::<T>(py)))?;
        Ok(Self(zeros.cast_into().map_err(PyErr::from)?))
    }

    /// The entries, in C order.
    pub fn entries(&mut self) -> &mut [T] {
        // SAFETY: `numpy.zeros` made this array contiguous, and nobody else has seen it yet.
        unsafe { self.0.as_slice_mut() }.expect("numpy.zeros returns contiguous arrays")
    }

    /// The array, for Python.
    pub fn into_array(self) -> Bound<'py, PyAny> {
        self.0.into_any()
    }
}

/// A new array of the given shape that holds a copy of `entries`.
pub fn copy<'py, T: Scalar>(py: Python<'py>, entries: &[T], shape: &[usize]) -> Result<Bound<'py, PyAny>> {
    let mut copy = Output::new(py, shape)?;
    copy.entries().copy_from_slice(entries);
    Ok(copy.into_array())
}

/// `entries` as a Python array of the given shape.
pub fn from_vec<'py, T: Scalar>(py: Python<'py>, entries: Vec<T>, shape: &[usize]) -> Result<Bound<'py, PyAny>> {
    Ok(numpy::PyArray1::from_vec(py, entries).reshape(shape.to_vec())?.into_any())
}
