//! Runs the kernels that cluster under the emulator.

use cuda_std::U32x4;
use cuda_std::emulator::{Buffer, Fault, Launch};
use spinkv_kernels::abi::cluster;
use spinkv_kernels::index::cluster as kernels;

use super::{ClusterCase, Stage, State};
use crate::emulated::{to_words, words};

/// The state in the emulator's memory.
struct Buffers {
    sums: Buffer<U32x4>,
    means: Buffer<U32x4>,
    centroids: Buffer<U32x4>,
    biases: Buffer<f32>,
    bias_pairs: Buffer<u64>,
    assigned: Buffer<u32>,
    assigned_words: Buffer<U32x4>,
    sizes: Buffer<u32>,
    row_pages: Buffer<u32>,
    firsts: Buffer<u32>,
    partition_tokens: Buffer<u32>,
    summaries: Buffer<U32x4>,
    value_means: Buffer<U32x4>,
    members: Buffer<u32>,
    host_pages: Buffer<U32x4>,
    host_valid: Buffer<u32>,
}

impl Buffers {
    fn new(state: &State) -> Self {
        Self {
            sums: words(&state.sums),
            means: words(&state.means),
            centroids: words(&state.centroids),
            biases: Buffer::from_slice(&state.biases),
            bias_pairs: Buffer::from_slice(&bytemuck::pod_collect_to_vec::<_, u64>(&state.biases)),
            assigned: Buffer::from_slice(&state.assigned),
            assigned_words: words(&bytemuck::pod_collect_to_vec::<_, u128>(&state.assigned)),
            sizes: Buffer::from_slice(&state.sizes),
            row_pages: Buffer::from_slice(&state.row_pages),
            firsts: Buffer::from_slice(&state.firsts),
            partition_tokens: Buffer::from_slice(&state.partition_tokens),
            summaries: words(&state.summaries),
            value_means: words(&state.value_means),
            members: Buffer::from_slice(&state.members),
            host_pages: words(&state.host_pages),
            host_valid: Buffer::from_slice(&state.host_valid),
        }
    }

    fn state(&self) -> State {
        State {
            sums: to_words(&self.sums),
            means: to_words(&self.means),
            centroids: to_words(&self.centroids),
            biases: self.biases.to_vec(),
            assigned: self.assigned.to_vec(),
            sizes: self.sizes.to_vec(),
            row_pages: self.row_pages.to_vec(),
            firsts: self.firsts.to_vec(),
            partition_tokens: self.partition_tokens.to_vec(),
            summaries: to_words(&self.summaries),
            value_means: to_words(&self.value_means),
            members: self.members.to_vec(),
            host_pages: to_words(&self.host_pages),
            host_valid: self.host_valid.to_vec(),
        }
    }
}

impl ClusterCase {
    /// The state after a stage ran on `before` in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, stage: Stage, before: &State, schedule: u64) -> Result<State, Fault> {
        let (keys, values) = (words(&self.keys), words(&self.values));
        let directories = Buffer::from_slice(&self.directories);
        let host_slabs = Buffer::from_slice(&self.host_slabs);
        let buffers = Buffers::new(before);
        let sizes =
            [self.first, self.tokens, self.kv_heads, self.head_words, self.spans, self.span_centroids];
        let [first, tokens, kv_heads, head_words, spans, span_centroids] = sizes.map(|size| size as u32);
        let sizes = [self.page_tokens, self.first_place + self.first_row, self.directory, self.first_row];
        let [page_tokens, first_place, directory, first_row] = sizes.map(|size| size as u32);
        let sizes = [self.request_rows, self.segment_partitions, self.member_pages()];
        let [request_rows, segment_partitions, member_pages] = sizes.map(|size| size as u32);
        let sizes = [self.first_slab, self.slab_stride];
        let [first_slab, slab_stride] = sizes.map(|size| size as u32);
        let clusters = spans * span_centroids;
        let launch = |blocks: u64, threads: u32, shared: u32, kernel: &dyn Fn()| {
            Launch::new(blocks as u32, threads).shared(shared as usize).seed(schedule).run(kernel).map(drop)
        };
        let assign = |spans: u32, counted: u32| {
            let kernel =
                if head_words == 8 { kernels::cluster_assign_64 } else { kernels::cluster_assign_128 };
            let blocks = cluster::assign::grid(kv_heads, tokens, spans);
            let shared = cluster::assign::shared_bytes(head_words);
            launch(blocks, cluster::assign::BLOCK, shared, &|| {
                // SAFETY: the emulator checks every access.
                unsafe {
                    kernel(
                        keys.view(),
                        first,
                        tokens,
                        kv_heads,
                        spans,
                        clusters / spans,
                        buffers.centroids.view(),
                        buffers.bias_pairs.view(),
                        buffers.assigned.view_mut(),
                        counted,
                        buffers.sizes.view_mut(),
                    );
                }
            })
        };
        match stage {
            Stage::Sums => {
                let width = kv_heads * head_words;
                let blocks = cluster::sums::grid(tokens, width);
                launch(blocks, cluster::sums::BLOCK, 0, &|| {
                    // SAFETY: as above.
                    unsafe {
                        kernels::cluster_sums(keys.view(), first, tokens, width, buffers.sums.view_mut())
                    };
                })
            }
            Stage::Start => {
                let blocks = cluster::start::grid(kv_heads, clusters);
                launch(blocks, cluster::start::BLOCK, cluster::start::SHARED_BYTES, &|| {
                    // SAFETY: as above.
                    unsafe {
                        kernels::cluster_start(
                            keys.view(),
                            first,
                            tokens,
                            kv_heads,
                            head_words,
                            spans,
                            span_centroids,
                            buffers.sums.view(),
                            buffers.means.view_mut(),
                            buffers.centroids.view_mut(),
                            buffers.biases.view_mut(),
                        );
                    }
                })
            }
            Stage::Assign => assign(spans, 0),
            Stage::AssignAll => assign(1, 1),
            Stage::Update => {
                let blocks = cluster::update::grid(kv_heads, clusters);
                launch(blocks, cluster::update::BLOCK, cluster::update::SHARED_BYTES, &|| {
                    // SAFETY: as above.
                    unsafe {
                        kernels::cluster_update(
                            keys.view(),
                            first,
                            tokens,
                            kv_heads,
                            head_words,
                            spans,
                            span_centroids,
                            buffers.means.view(),
                            buffers.assigned_words.view(),
                            buffers.centroids.view_mut(),
                            buffers.biases.view_mut(),
                        );
                    }
                })
            }
            Stage::Pages => {
                launch(kv_heads.into(), cluster::pages::BLOCK, cluster::pages::SHARED_BYTES, &|| {
                    // SAFETY: as above.
                    unsafe {
                        kernels::cluster_pages(
                            buffers.sizes.view(),
                            clusters,
                            page_tokens,
                            first_place,
                            buffers.row_pages.view_mut(),
                            buffers.firsts.view_mut(),
                        );
                    }
                })
            }
            Stage::List => {
                let blocks = cluster::update::grid(kv_heads, clusters);
                launch(blocks, cluster::update::BLOCK, cluster::update::SHARED_BYTES, &|| {
                    // SAFETY: as above.
                    unsafe {
                        kernels::cluster_list(
                            buffers.assigned_words.view(),
                            tokens,
                            head_words,
                            clusters,
                            page_tokens,
                            buffers.firsts.view(),
                            buffers.members.view_mut(),
                            member_pages,
                        );
                    }
                })
            }
            Stage::Means => launch(self.grid.into(), cluster::means::BLOCK, 0, &|| {
                // SAFETY: as above.
                unsafe {
                    kernels::cluster_means(
                        keys.view(),
                        values.view(),
                        first,
                        kv_heads,
                        head_words,
                        page_tokens,
                        first_place,
                        buffers.row_pages.view(),
                        buffers.members.view(),
                        member_pages,
                        directories.view(),
                        directory,
                        first_row,
                        request_rows,
                        segment_partitions,
                        buffers.summaries.view_mut(),
                        buffers.value_means.view_mut(),
                        buffers.partition_tokens.view_mut(),
                    );
                }
            }),
            Stage::Store => launch(self.grid.into(), cluster::store::BLOCK, 0, &|| {
                // SAFETY: as above.
                unsafe {
                    kernels::cluster_store(
                        keys.view(),
                        values.view(),
                        first,
                        kv_heads,
                        head_words,
                        page_tokens,
                        first_place,
                        buffers.row_pages.view(),
                        buffers.members.view(),
                        member_pages,
                        host_slabs.view(),
                        first_slab,
                        slab_stride,
                        first_row,
                        buffers.host_valid.view_mut(),
                        buffers.host_pages.view_mut(),
                    );
                }
            }),
        }?;
        Ok(buffers.state())
    }
}
