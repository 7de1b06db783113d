//! Matrix products over checked views, on the `gemm` crate.

use gemm::Parallelism;

/// What matrices are of: f32, or f64 where a method needs the digits.
pub trait Number: Copy + 'static {
    /// 1.
    const ONE: Self;
}

impl Number for f32 {
    const ONE: Self = 1.0;
}

impl Number for f64 {
    const ONE: Self = 1.0;
}

/// A matrix view: element `(i, j)` is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T = f32> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A row-major matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If `data` does not hold all elements.
    pub fn new(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        check_bounds(data.len(), rows, columns, row_stride);
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The same elements with rows and columns swapped.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix view to write.
#[derive(Debug)]
pub struct MatrixMut<'a, T = f32> {
    data: &'a mut [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a, T> MatrixMut<'a, T> {
    /// A row-major matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If `data` does not hold all elements, or rows overlap.
    pub fn new(data: &'a mut [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(row_stride >= columns, "rows of {columns} elements overlap at stride {row_stride}");
        check_bounds(data.len(), rows, columns, row_stride);
        Self { data, rows, columns, row_stride }
    }
}

/// What happens to the old elements of a product's destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Old {
    /// They are overwritten.
    Replace,
    /// The product is added to them.
    Add,
}

/// `out = a b`, or `out += a b`. With `parallel`, on the threads of rayon's pool.
///
/// # Panics
/// If the dimensions do not agree.
pub fn matmul<T: Number>(
    out: MatrixMut<'_, T>,
    old: Old,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    parallel: bool,
) {
    assert_eq!((out.rows, out.columns, a.columns), (a.rows, b.columns, b.rows), "matrix dimensions");
    let parallelism =
        if parallel { Parallelism::Rayon(rayon::current_num_threads()) } else { Parallelism::None };
    // SAFETY: the views' constructors checked that every element (i, j) below (rows, columns) lies within its
    // slice at i * row_stride + j * column_stride; the dimensions agree; `out` is borrowed mutably and so
    // overlaps neither `a` nor `b`, and its rows do not overlap each other.
    unsafe {
        gemm::gemm(
            out.rows,
            out.columns,
            a.columns,
            out.data.as_mut_ptr(),
            1,
            out.row_stride as isize,
            old == Old::Add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn check_bounds(len: usize, rows: usize, columns: usize, row_stride: usize) {
    let last_row = rows.saturating_sub(1).checked_mul(row_stride);
    let needed = match last_row.and_then(|start| start.checked_add(columns)) {
        _ if rows == 0 || columns == 0 => 0,
        Some(needed) => needed,
        None => usize::MAX,
    };
    assert!(
        needed <= len,
        "a {rows} x {columns} matrix at stride {row_stride} needs {needed} elements of {len}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_with_strides_and_transposes_match_the_definition() {
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f32> = (0..m * 4).map(|i| i as f32).collect(); // stride 4
        let b: Vec<f32> = (0..n * k).map(|i| (i % 5) as f32).collect(); // [n, k]
        let mut out = vec![100.0; m * 9]; // stride 9
        for old in [Old::Replace, Old::Add] {
            let view = MatrixMut::new(&mut out, m, n, 9);
            matmul(view, old, Matrix::new(&a, m, k, 4), Matrix::new(&b, n, k, k).transposed(), false);
        }
        for i in 0..m {
            for j in 0..9 {
                let product: f32 =
                    (0..k).map(|l| a[i * 4 + l] * if j < n { b[j * k + l] } else { 0.0 }).sum();
                let expected = if j < n { 2.0 * product } else { 100.0 };
                assert_eq!(out[i * 9 + j], expected, "({i}, {j})");
            }
        }
    }

    #[test]
    #[should_panic(expected = "of 8")]
    fn a_view_whose_size_overflows_is_refused() {
        Matrix::new(&[0.0; 8], (1 << 32) + 1, 1, 1 << 32);
    }

    #[test]
    #[should_panic(expected = "needs 8 elements of 7")]
    fn a_view_beyond_its_slice_is_refused() {
        Matrix::new(&[0.0; 7], 2, 3, 5);
    }
}
