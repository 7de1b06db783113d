//! Runs the kernels under the emulator.

use cuda_std::emulator::{Buffer, Fault, Launch};
use cuda_std::{Global, U32x4};
use spinkv::backend::cpu::low_rank::{ITERATIONS, Pivots, start};
use spinkv_kernels::abi::low_rank::{
    complete_basis as complete_abi, gram as gram_abi, inverse_factor as factor_abi, product,
    project_keys as project_abi,
};
use spinkv_kernels::abi::low_rank::{rebuild_keys, store_basis as basis_abi, unrotate as unrotate_abi};
use spinkv_kernels::index::low_rank::{
    complete_basis, gram, gram_sum, inverse_factor, project_keys, row_dots, row_sums, store_basis, unrotate,
};
use spinkv_kernels::retrieve::{rebuild_keys_64, rebuild_keys_128};

use super::{
    Basis, BasisCase, CompleteCase, FactorCase, GramCase, ProductCase, ProjectCase, Projected, RebuildCase,
    UnrotateCase,
};
use crate::emulated::{entries, quads, to_words, words};

impl UnrotateCase {
    /// Keys after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let (keys, plain) = (words(&self.keys), words(&self.plain()));
        let frequencies = quads(&self.frequencies);
        let [tokens, kv_heads, head_words] =
            [self.tokens, self.kv_heads, self.head_words].map(|size| size as u32);
        let launch = Launch::new(unrotate_abi::grid(tokens), unrotate_abi::BLOCK);
        launch.seed(schedule).run(|| {
            let (keys, frequencies, plain) = (keys.view(), frequencies.view(), plain.view_mut());
            let (first, factor) = (self.first_position, 1.0 / self.magnitude);
            // SAFETY: the emulator checks every access.
            unsafe { unrotate(keys, tokens, kv_heads, head_words, first, frequencies, factor, plain) };
        })?;
        Ok(to_words(&plain))
    }
}

/// What `gram` and `gram_sum` make of keys.
fn run_gram(
    keys: &[u128],
    [tokens, width, shares]: [u32; 3],
    before: &[f32],
    schedule: u64,
) -> Result<Vec<f32>, Fault> {
    let (keys, gram_of) = (words(keys), Buffer::from_slice(before));
    let sums = vec![0xdead_beef_dead_beef_u64; 2 * gram_abi::sum_words(width, shares) as usize];
    let sums = Buffer::from_slice(&sums);
    let tiles = gram_abi::tiles(width);
    let launch = Launch::new(tiles * shares, gram_abi::BLOCK).shared(gram_abi::SHARED_BYTES as usize);
    launch.seed(schedule).run(|| {
        // SAFETY: the emulator checks every access.
        unsafe { gram(keys.view(), tokens, width / 8, shares, sums.view_mut()) };
    })?;
    let sums = words(&bytemuck::pod_collect_to_vec::<u64, u128>(&sums.to_vec()));
    let blocks = tiles * gram_abi::TILE_SUMS / gram_abi::SUM_BLOCK;
    Launch::new(blocks, gram_abi::SUM_BLOCK).seed(schedule).run(|| {
        // SAFETY: as above.
        unsafe { gram_sum(sums.view(), width, shares, gram_of.view_mut()) };
    })?;
    Ok(gram_of.to_vec())
}

impl GramCase {
    /// The matrix after the kernels ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<f32>, Fault> {
        let sizes = [self.tokens as u32, self.width as u32, self.shares];
        run_gram(&self.keys, sizes, &self.gram(), schedule)
    }
}

/// What `row_dots` or `row_sums` makes of two matrices.
fn run_product(
    sums: bool,
    a: &[f32],
    b: &[f32],
    [rows, columns, inner]: [u32; 3],
    before: &[f32],
    schedule: u64,
) -> Result<Vec<f32>, Fault> {
    let (a, b, out) = (quads(a), quads(b), quads(before));
    let blocks = product::grid(rows, columns) as u32;
    let launch = Launch::new(blocks, product::BLOCK).shared(product::SHARED_BYTES as usize);
    let kernel = if sums { row_sums } else { row_dots };
    launch.seed(schedule).run(|| {
        let (a, b): (Global<U32x4>, Global<U32x4>) = (a.view(), b.view());
        // SAFETY: the emulator checks every access.
        unsafe { kernel(a, b, rows, columns, inner, out.view_mut()) };
    })?;
    Ok(bytemuck::pod_collect_to_vec(&to_words(&out)))
}

impl ProductCase {
    /// The product after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<f32>, Fault> {
        let sizes = [self.rows, self.columns, self.inner].map(|size| size as u32);
        run_product(self.sums, &self.a, &self.b, sizes, &self.out(), schedule)
    }
}

/// What `inverse_factor` makes of products.
fn run_factor(
    products: &[f32],
    rank: u32,
    small: Pivots,
    before: &[f32],
    schedule: u64,
) -> Result<Vec<f32>, Fault> {
    let (products, factor) = (Buffer::from_slice(products), Buffer::from_slice(before));
    let launch = Launch::new(1, factor_abi::BLOCK).shared(factor_abi::shared_bytes(rank) as usize);
    launch.seed(schedule).run(|| {
        let drops = u32::from(small == Pivots::Dropped);
        // SAFETY: the emulator checks every access.
        unsafe { inverse_factor(products.view(), rank, drops, factor.view_mut()) };
    })?;
    Ok(factor.to_vec())
}

impl FactorCase {
    /// The factor after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<f32>, Fault> {
        run_factor(&self.products, self.rank as u32, self.small, &self.factor(), schedule)
    }
}

/// What `complete_basis` makes of vectors.
fn run_complete(vectors: &[f32], [rank, width]: [u32; 2], schedule: u64) -> Result<Vec<f32>, Fault> {
    let vectors = Buffer::from_slice(vectors);
    let shared = complete_abi::shared_bytes(rank, width) as usize;
    Launch::new(1, complete_abi::BLOCK).shared(shared).seed(schedule).run(|| {
        // SAFETY: the emulator checks every access.
        unsafe { complete_basis(vectors.view_mut(), rank, width) };
    })?;
    Ok(vectors.to_vec())
}

impl CompleteCase {
    /// The vectors after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<f32>, Fault> {
        run_complete(&self.vectors, [self.rank, self.width].map(|size| size as u32), schedule)
    }
}

impl ProjectCase {
    /// What is there after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Projected, Fault> {
        let before = self.before();
        let (entries, steady) = (entries(&self.entries), Buffer::from_slice(&self.steady));
        let (pool, bases, frequencies) = (words(&self.pool), words(&self.bases), quads(&self.frequencies));
        let (directories, coefficients) =
            (Buffer::from_slice(&self.directories), words(&before.coefficients));
        let (copies, keys) = (Buffer::from_slice(&before.copies), Buffer::from_slice(&before.keys));
        let counts = Buffer::from_slice(&before.counts);
        let sizes = [self.kv_heads, self.layer, self.layers, self.head_words, self.page_tokens];
        let [kv_heads, layer, layers, head_words, page_tokens] = sizes.map(|size| size as u32);
        let (rank_words, capacity) = (self.rank_words as u32, self.capacity as u32);
        let launch =
            Launch::new(project_abi::grid(self.entries.len() as u32, rank_words), project_abi::BLOCK)
                .shared(project_abi::shared_bytes(kv_heads * head_words * 8) as usize);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                project_keys(
                    entries.view(),
                    steady.view(),
                    pool.view(),
                    kv_heads,
                    layer,
                    layers,
                    head_words,
                    page_tokens,
                    frequencies.view(),
                    1.0 / self.magnitude,
                    bases.view(),
                    rank_words,
                    directories.view(),
                    coefficients.view_mut(),
                    copies.view_mut(),
                    keys.view_mut(),
                    counts.view_mut(),
                    capacity,
                );
            }
        })?;
        Ok(Projected {
            coefficients: to_words(&coefficients),
            copies: copies.to_vec(),
            keys: keys.to_vec(),
            counts: counts.to_vec(),
        })
    }
}

impl BasisCase {
    /// The basis after all kernels ran, in the order of `LowRankBasis`' launches.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Basis, Fault> {
        let [tokens, width, rank] = [self.tokens, self.width, self.rank].map(|size| size as u32);
        let gram = run_gram(&self.keys, [tokens, width, 2], &vec![0.0; self.width * self.width], schedule)?;
        let (many, few) = (vec![f32::NAN; self.rank * self.width], vec![f32::NAN; self.rank * self.rank]);
        let orthogonalised = |vectors: &[f32], small| -> Result<Vec<f32>, Fault> {
            let products = run_product(false, vectors, vectors, [rank, rank, width], &few, schedule)?;
            let factor = run_factor(&products, rank, small, &few, schedule)?;
            run_product(true, &factor, vectors, [rank, width, rank], &many, schedule)
        };
        let mut vectors = start(self.rank, self.width);
        for _ in 0..ITERATIONS {
            let images = run_product(false, &vectors, &gram, [rank, width, width], &many, schedule)?;
            vectors = orthogonalised(&images, Pivots::Raised)?;
        }
        for _ in 0..2 {
            vectors = orthogonalised(&vectors, Pivots::Dropped)?;
        }
        let vectors = run_complete(&vectors, [rank, width], schedule)?;
        let before = self.basis();
        let (rows, bases) = (words(&before.rows), words(&before.bases));
        let vectors = Buffer::from_slice(&vectors);
        let launch = Launch::new(basis_abi::grid(rank * width / 8), basis_abi::BLOCK);
        launch.seed(schedule).run(|| {
            let (rows, bases) = (rows.view_mut(), bases.view_mut());
            // SAFETY: the emulator checks every access.
            unsafe { store_basis(vectors.view(), rank, width, rows, self.place as u32, bases) };
        })?;
        Ok(Basis { rows: to_words(&rows), bases: to_words(&bases) })
    }
}

impl RebuildCase {
    /// The pool after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let (copies, keys) = (Buffer::from_slice(&self.copies), Buffer::from_slice(&self.copy_keys));
        let (counts, directories) = (Buffer::from_slice(&self.counts), Buffer::from_slice(&self.directories));
        let (coefficients, bases) = (words(&self.coefficients), words(&self.bases));
        let (entries, frequencies) = (entries(&self.entries), Buffer::from_slice(&self.frequencies));
        let pool: Vec<u32> = bytemuck::pod_collect_to_vec(&self.pool());
        let pool = Buffer::from_slice(&pool);
        let sizes = [self.counts.len(), self.copies.len() / self.counts.len(), self.kv_heads];
        let [lists, capacity, kv_heads] = sizes.map(|size| size as u32);
        let sizes = [self.layer, self.layers, self.rank_words, self.page_tokens];
        let [layer, layers, rank_words, page_tokens] = sizes.map(|size| size as u32);
        let shared = rebuild_keys::shared_bytes(8 * self.head_words as u32, rank_words, lists);
        let kernel = if self.head_words == 8 { rebuild_keys_64 } else { rebuild_keys_128 };
        let launch = Launch::new(self.blocks, rebuild_keys::BLOCK).shared(shared as usize);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                kernel(
                    copies.view(),
                    keys.view(),
                    counts.view(),
                    lists,
                    capacity,
                    entries.view(),
                    kv_heads,
                    layer,
                    layers,
                    directories.view(),
                    coefficients.view(),
                    rank_words,
                    bases.view(),
                    frequencies.view(),
                    self.magnitude,
                    page_tokens,
                    pool.view_mut(),
                );
            }
        })?;
        Ok(bytemuck::pod_collect_to_vec(&pool.to_vec()))
    }
}
