//! Keys in low rank: what a layer's keys have in common, found by a subspace iteration.
//!
//! Keys before their rotary embedding, all KV heads of a layer side by side, lie near a subspace of far fewer dimensions than they have
//! elements (ShadowKV, arXiv 2410.21465). [`LowRankFactors`] holds an orthonormal basis of it and each token's coefficients, from which a key
//! of any head is rebuilt where it is needed.
//!
//! # Method
//! The best subspace of `r` dimensions is that of the greatest eigenvalues of the Gram matrix `G = K^T K`. With `Q^T`, `[r, width]`, random at
//! first, [`ITERATIONS`] times: `Y^T = Q^T G`, then `Q^T = L^-1 Y^T` where `L L^T = Y^T Y` (Cholesky QR). A basis is all that is needed, not
//! the eigenvectors themselves: `K V V^T` is the same for every orthonormal basis `V` of a subspace.
//!
//! Any `L` gives a `Q` of the same span, so those on the way only have to keep its vectors apart: small pivots are raised ([`Pivots::Raised`]),
//! which leaves such a vector short and those behind it as they are, until the next product. The last two orthonormalise, and drop
//! what depends on the vectors before it ([`Pivots::Dropped`]): a dropped direction is zero everywhere.
//!
//! So it is a handful of matrix products and small factors, which a GPU has too. Only the first, and the coefficients, grow with the
//! tokens. Here it is in f64, as far as factors that are stored in f32 allow.

use thiserror::Error;

use super::linalg::{Matrix, MatrixMut, Old, matmul};

/// Products with the Gram matrix.
pub const ITERATIONS: usize = 8;

/// What becomes of the pivots of vectors that nearly depend on those before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pivots {
    /// Those below [`LEAST_RAISED`] are raised to it, and nothing of their vectors is taken from those behind: it would be rounding more than
    /// direction, and would grow from pivot to pivot.
    Raised,
    /// Those below [`LEAST_KEPT`] drop their vectors.
    Dropped,
}

/// The least pivot of an iteration, of vectors of length 1: the square of what the vectors before leave of one. Rounding of f32 is some way
/// below it.
pub const LEAST_RAISED: f64 = 1e-5;

/// The least pivot of a direction of its own.
pub const LEAST_KEPT: f64 = 1e-4;

/// Why there are no factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LowRankError {
    /// The rank is none of 1 to the width of a token's keys.
    #[error("a rank of {rank} is not in 1..={width}, the KV heads times the head dimension")]
    Rank {
        /// What was asked for.
        rank: usize,
        /// KV heads times head dimension.
        width: usize,
    },
    /// The keys are not those of whole tokens.
    #[error("{elements} elements are not whole tokens of {width}, the KV heads times the head dimension")]
    Keys {
        /// How many there are.
        elements: usize,
        /// KV heads times head dimension.
        width: usize,
    },
    /// An element of a key is infinite or NaN: it would be in every factor.
    #[error("element {element} of token {token} is not finite")]
    NotFinite {
        /// The token.
        token: usize,
        /// The element of its keys, of all heads.
        element: usize,
    },
}

/// Keys of a layer, in low rank.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRankFactors {
    kv_heads: usize,
    head_dim: usize,
    rank: usize,
    /// `U`, `[tokens, rank]`.
    coefficients: Vec<f32>,
    /// `S V^T`, `[kv_heads, rank, head_dim]`; with the singular values in `U`, so that the rows, over all heads, are orthonormal.
    basis: Vec<f32>,
}

impl LowRankFactors {
    /// The best factors of rank `rank` of a layer's keys before their rotary embedding, `[tokens, kv_heads, head_dim]`.
    ///
    /// Keys that have a lower rank, such as those of fewer than `rank` tokens, are rebuilt as they were but for rounding: basis vectors
    /// that are left over are zero, or their coefficients are next to zero.
    ///
    /// # Errors
    /// [`LowRankError`].
    pub fn new(keys: &[f32], kv_heads: usize, head_dim: usize, rank: usize) -> Result<Self, LowRankError> {
        let width = kv_heads * head_dim;
        if !(1..=width).contains(&rank) {
            return Err(LowRankError::Rank { rank, width });
        }
        check(keys, width)?;
        let basis = by_head(&subspace(&gram(keys, width), width, rank), kv_heads, head_dim);
        let mut factors = Self { kv_heads, head_dim, rank, coefficients: Vec::new(), basis };
        factors.coefficients = factors.project(keys);
        Ok(factors)
    }

    /// Dimensions of the subspace.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Tokens that have coefficients.
    pub fn tokens(&self) -> usize {
        self.coefficients.len() / self.rank
    }

    /// `U`: each token's coefficients, `[tokens, rank]`.
    pub fn coefficients(&self) -> &[f32] {
        &self.coefficients
    }

    /// The basis, `[kv_heads, rank, head_dim]`: head `h` of basis vector `i` is row `h * rank + i`. Over all heads basis vectors have length
    /// 1 and are orthogonal.
    pub fn basis(&self) -> &[f32] {
        &self.basis
    }

    /// Gives tokens to come their coefficients in the basis that there is; `keys` as for [`new`](Self::new). What of them lies outside of
    /// the subspace is lost.
    ///
    /// # Errors
    /// [`LowRankError::Keys`] and [`LowRankError::NotFinite`]; no token is then added.
    pub fn append(&mut self, keys: &[f32]) -> Result<(), LowRankError> {
        check(keys, self.kv_heads * self.head_dim)?;
        self.coefficients.extend(self.project(keys));
        Ok(())
    }

    /// The key of KV head `head` of token `token`, into `key`, `[head_dim]`; `rotate` then turns it to the token's position.
    ///
    /// # Panics
    /// If there is no such token or head, or `key` has another length.
    pub fn rebuild(&self, token: usize, head: usize, key: &mut [f32], rotate: impl FnOnce(&mut [f32])) {
        assert_eq!(key.len(), self.head_dim, "elements of a key");
        let coefficients = &self.coefficients[token * self.rank..][..self.rank];
        rebuild(
            coefficients,
            &self.basis[head * self.rank * self.head_dim..][..self.rank * self.head_dim],
            key,
        );
        rotate(key);
    }

    /// Coefficients of keys, `[tokens, rank]`.
    fn project(&self, keys: &[f32]) -> Vec<f32> {
        let tokens = keys.len() / (self.kv_heads * self.head_dim);
        let mut coefficients = vec![0.0; tokens * self.rank];
        project(keys, &self.basis, self.kv_heads, self.head_dim, &mut coefficients);
        coefficients
    }
}

/// The coefficients, `[tokens, rank]`, of keys before their rotary embedding, `[tokens, kv_heads, head_dim]`, in a basis,
/// `[kv_heads, rank, head_dim]`: their dot products with its vectors.
///
/// # Panics
/// If the lengths do not agree.
pub fn project(keys: &[f32], basis: &[f32], kv_heads: usize, head_dim: usize, coefficients: &mut [f32]) {
    let width = kv_heads * head_dim;
    let (tokens, rank) = (keys.len() / width, basis.len() / width);
    assert_eq!(coefficients.len(), tokens * rank, "coefficients of {tokens} tokens");
    for (head, basis) in basis.chunks_exact(rank * head_dim).enumerate() {
        // Of no token there is nothing to start from.
        let of_head = &keys[(head * head_dim).min(keys.len())..];
        matmul(
            MatrixMut::new(coefficients, tokens, rank, rank),
            if head == 0 { Old::Replace } else { Old::Add },
            Matrix::new(of_head, tokens, head_dim, width),
            Matrix::new(basis, rank, head_dim, head_dim).transposed(),
            true,
        );
    }
}

/// The basis of rank `rank` that keys are kept in, `[kv_heads, rank, head_dim]`: the best for `keys`, `[tokens, kv_heads, head_dim]`, before
/// their rotary embedding, filled up by [`complete`], so that at full rank every key can be rebuilt.
///
/// # Errors
/// [`LowRankError`].
pub fn whole_basis(
    keys: &[f32],
    kv_heads: usize,
    head_dim: usize,
    rank: usize,
) -> Result<Vec<f32>, LowRankError> {
    let width = kv_heads * head_dim;
    if !(1..=width).contains(&rank) {
        return Err(LowRankError::Rank { rank, width });
    }
    check(keys, width)?;
    let mut rows = subspace(&gram(keys, width), width, rank);
    complete(&mut rows, width);
    Ok(by_head(&rows, kv_heads, head_dim))
}

/// Fills up the rows of zero of `rows`, `[rank, width]`, the others being orthonormal: each becomes the axis of which the rows have least (the
/// lowest of those), less what they have of it, at length 1. So the rows are orthonormal.
pub fn complete(rows: &mut [f64], width: usize) {
    // What the rows leave of each axis, in squares.
    let mut left = vec![1.0; width];
    let take = |row: &[f64], left: &mut [f64]| {
        left.iter_mut().zip(row).for_each(|(left, element)| *left -= element * element);
    };
    rows.chunks_exact(width).for_each(|row| take(row, &mut left));
    for empty in 0..rows.len() / width {
        if rows[empty * width..][..width].iter().any(|element| *element != 0.0) {
            continue;
        }
        let first = |best: usize, axis: usize| if left[axis] > left[best] { axis } else { best };
        let axis = (0..width).reduce(first).expect("a row has elements");
        let mut added = vec![0.0; width];
        added[axis] = 1.0;
        // Once more, for what rounding left. A row of zero takes nothing.
        for _ in 0..2 {
            for row in rows.chunks_exact(width) {
                let dot: f64 = row.iter().zip(&added).map(|(a, b)| a * b).sum();
                added.iter_mut().zip(row).for_each(|(added, element)| *added -= dot * element);
            }
        }
        let length = added.iter().map(|element| element * element).sum::<f64>().sqrt();
        added.iter_mut().for_each(|element| *element /= length);
        take(&added, &mut left);
        rows[empty * width..][..width].copy_from_slice(&added);
    }
}

/// `[rank, width]` as `[kv_heads, rank, head_dim]`, in f32.
fn by_head(rows: &[f64], kv_heads: usize, head_dim: usize) -> Vec<f32> {
    let width = kv_heads * head_dim;
    let head =
        |head: usize| rows.chunks_exact(width).flat_map(move |row| &row[head * head_dim..][..head_dim]);
    (0..kv_heads).flat_map(head).map(|element| *element as f32).collect()
}

/// A token's key of one head, `[head_dim]`: `coefficients`, `[rank]`, times the head's `basis`, `[rank, head_dim]`, summed in order.
///
/// # Panics
/// If the lengths do not agree.
pub fn rebuild(coefficients: &[f32], basis: &[f32], key: &mut [f32]) {
    assert_eq!(coefficients.len() * key.len(), basis.len(), "a basis vector a coefficient");
    key.fill(0.0);
    for (coefficient, vector) in coefficients.iter().zip(basis.chunks_exact(key.len())) {
        super::math::axpy(*coefficient, vector, key);
    }
}

/// `K^T K`, `[width, width]`, of `keys`, `[tokens, width]`.
///
/// # Panics
/// If the keys are not those of whole tokens.
pub fn gram(keys: &[f32], width: usize) -> Vec<f64> {
    assert!(keys.len().is_multiple_of(width), "{} elements in rows of {width}", keys.len());
    let mut gram = vec![0.0; width * width];
    for keys in keys.chunks(1024 * width) {
        let keys: Vec<f64> = keys.iter().map(|element| f64::from(*element)).collect();
        let keys = Matrix::new(&keys, keys.len() / width, width, width);
        matmul(MatrixMut::new(&mut gram, width, width, width), Old::Add, keys.transposed(), keys, true);
    }
    gram
}

/// An orthonormal basis of the subspace of `rank` dimensions that has most of `gram`, `[width, width]`: `[rank, width]`, with rows of zero
/// if it has no more than the others hold.
pub fn subspace(gram: &[f64], width: usize, rank: usize) -> Vec<f64> {
    let mut basis: Vec<f64> = start(rank, width).into_iter().map(f64::from).collect();
    let mut images = vec![0.0; rank * width];
    for _ in 0..ITERATIONS {
        product(&mut images, &basis, Matrix::new(gram, width, width, width), rank);
        basis.copy_from_slice(&images);
        orthogonalise(&mut basis, rank, width, Pivots::Raised);
    }
    for _ in 0..2 {
        orthogonalise(&mut basis, rank, width, Pivots::Dropped);
    }
    basis
}

/// Where the iteration starts: `[rank, width]`, each 1 or -1 by a fixed sequence (SplitMix64), so that factors are the same each time.
pub fn start(rank: usize, width: usize) -> Vec<f32> {
    let mut state = 0_u64;
    let mut sign = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        if mixed >> 63 == 0 { 1.0 } else { -1.0 }
    };
    (0..rank * width).map(|_| sign()).collect()
}

/// Replaces `rows`, `[n, width]`, by `L^-1` times them; see [`inverse_factor`].
fn orthogonalise(rows: &mut [f64], n: usize, width: usize, small: Pivots) {
    let mut products = vec![0.0; n * n];
    product(&mut products, rows, Matrix::new(rows, n, width, width).transposed(), n);
    let factor = inverse_factor(&products, n, small);
    let before = rows.to_vec();
    product(rows, &factor, Matrix::new(&before, n, width, width), n);
}

/// `out = a b` of dense matrices, `a` having `rows` rows.
fn product(out: &mut [f64], a: &[f64], b: Matrix<'_, f64>, rows: usize) {
    let (columns, inner) = (out.len() / rows, a.len() / rows);
    let (out, a) = (MatrixMut::new(out, rows, columns, columns), Matrix::new(a, rows, inner, inner));
    matmul(out, Old::Replace, a, b, true);
}

/// The inverse of the lower Cholesky factor of `products`, `[n, n]`, the dot products of `n` vectors: times the vectors it
/// makes them orthonormal, each out of itself and those before it.
///
/// Vectors count as of length 1, and `small` says what becomes of those that nearly depend on those before them. The row and the column of a
/// vector that is dropped are 0, as are those of a vector of length 0.
///
/// Gaussian elimination in place: what is left of the products, and below the diagonal the inverse of what has been eliminated.
///
/// # Panics
/// If `products` has another size.
pub fn inverse_factor(products: &[f64], n: usize, small: Pivots) -> Vec<f64> {
    assert_eq!(products.len(), n * n, "products of {n} vectors");
    let inverse_root = |square: f64| if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 };
    let scales: Vec<f64> = (0..n).map(|i| inverse_root(products[i * n + i])).collect();
    let mut rest = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            rest[i * n + j] = products[i * n + j] * scales[i] * scales[j];
        }
    }
    let mut roots = vec![0.0; n];
    for j in 0..n {
        let pivot = rest[j * n + j];
        let (root, inverse) = match small {
            _ if scales[j] == 0.0 => (0.0, 0.0),
            Pivots::Raised if pivot >= LEAST_RAISED => (inverse_root(pivot), 1.0 / pivot),
            Pivots::Raised => (inverse_root(LEAST_RAISED), 0.0),
            Pivots::Dropped if pivot >= LEAST_KEPT => (inverse_root(pivot), 1.0 / pivot),
            Pivots::Dropped => (0.0, 0.0),
        };
        roots[j] = root;
        rest[j * n + j] = 1.0;
        let (upper, lower) = rest.split_at_mut((j + 1) * n);
        let pivot_row = &upper[j * n..];
        for row in lower.chunks_exact_mut(n) {
            let multiplier = row[j] * inverse;
            row[j] = 0.0;
            row.iter_mut().zip(pivot_row).for_each(|(element, of_pivot)| *element -= multiplier * of_pivot);
        }
    }
    for i in 0..n {
        for j in 0..n {
            rest[i * n + j] *= if j > i { 0.0 } else { roots[i] * scales[j] };
        }
    }
    rest
}

fn check(keys: &[f32], width: usize) -> Result<(), LowRankError> {
    if !keys.len().is_multiple_of(width) {
        return Err(LowRankError::Keys { elements: keys.len(), width });
    }
    match keys.iter().position(|element| !element.is_finite()) {
        Some(at) => Err(LowRankError::NotFinite { token: at / width, element: at % width }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
