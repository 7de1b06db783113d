//! What each stage makes of a state.

use cuda_std::math::rsqrt_approx;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use spinkv_kernels::abi::cluster::{NO_TOKEN, span_start, start, start_token, sums};
use spinkv_kernels::abi::{SLAB_PAGES, WORD_ELEMENTS, host_page};

use super::{ClusterCase, Stage, State};

impl ClusterCase {
    /// Whether a stage has made of `before` what it should, and has left alone the rest. Products are added in another order on a GPU than here:
    /// unless `exact`, a token may have another centroid whose product is as good but for rounding.
    ///
    /// # Errors
    /// What differs first.
    pub fn check(&self, stage: Stage, before: &State, after: &State, exact: bool) -> Result<(), String> {
        let mut expected = before.clone();
        match stage {
            Stage::Sums => self.sums(&mut expected),
            Stage::Start => self.start(&mut expected),
            Stage::Assign => self.assign(&mut expected, self.spans, after, exact)?,
            Stage::AssignAll => {
                self.assign(&mut expected, 1, after, exact)?;
                self.count(&mut expected);
            }
            Stage::Update => self.update(&mut expected),
            Stage::Pages => self.pages(&mut expected),
            Stage::List => self.list(&mut expected),
            Stage::Means => self.means(&mut expected),
            Stage::Store => self.store(&mut expected),
        }
        compare("sums", &expected.sums, &after.sums)?;
        compare("means", &expected.means, &after.means)?;
        compare("centroids", &expected.centroids, &after.centroids)?;
        let bits = |biases: &[f32]| biases.iter().map(|bias| bias.to_bits()).collect::<Vec<_>>();
        compare("biases", &bits(&expected.biases), &bits(&after.biases))?;
        compare("assigned", &expected.assigned, &after.assigned)?;
        compare("sizes", &expected.sizes, &after.sizes)?;
        compare("row_pages", &expected.row_pages, &after.row_pages)?;
        compare("firsts", &expected.firsts, &after.firsts)?;
        compare("partition_tokens", &expected.partition_tokens, &after.partition_tokens)?;
        compare("summaries", &expected.summaries, &after.summaries)?;
        compare("value_means", &expected.value_means, &after.value_means)?;
        compare("members", &expected.members, &after.members)?;
        compare("host_pages", &expected.host_pages, &after.host_pages)?;
        compare("host_valid", &expected.host_valid, &after.host_valid)
    }

    fn channels(&self) -> usize {
        self.head_words * WORD_ELEMENTS
    }

    /// The words of a token's key or value.
    fn words_of<'a>(&self, tensor: &'a [u128], head: usize, token: usize) -> &'a [u128] {
        let row = (self.first + token) * self.kv_heads + head;
        &tensor[row * self.head_words..][..self.head_words]
    }

    fn head_of(&self, tensor: &[u128], head: usize, token: usize) -> Vec<f32> {
        numbers(self.words_of(tensor, head, token))
    }

    fn mean(&self, state: &State, head: usize) -> Vec<f32> {
        f32s(&state.means[head * 2 * self.head_words..][..2 * self.head_words])
    }

    /// The tokens of a span.
    fn span(&self, span: usize) -> std::ops::Range<usize> {
        let at = |span: usize| span_start(self.tokens as u32, self.spans as u32, span as u32) as usize;
        at(span)..at(span + 1)
    }

    fn sums(&self, state: &mut State) {
        let mut all = Vec::new();
        for part in 0..sums::parts(self.tokens as u32) as usize {
            let first = part * sums::PART_TOKENS as usize;
            for head in 0..self.kv_heads {
                let mut sum = vec![0.0; self.channels()];
                for token in first..(first + sums::PART_TOKENS as usize).min(self.tokens) {
                    add(&mut sum, &self.head_of(&self.keys, head, token));
                }
                all.extend(sum);
            }
        }
        state.sums = bytemuck::pod_collect_to_vec(&all);
    }

    fn start(&self, state: &mut State) {
        let (channels, width) = (self.channels(), self.kv_heads * self.channels());
        let parts = f32s(&state.sums);
        let groups = start::BLOCK as usize / (2 * self.head_words);
        let mut means = Vec::new();
        for head in 0..self.kv_heads {
            let mut sum = vec![0.0; channels];
            for group in 0..groups {
                let mut of_group = vec![0.0; channels];
                for row in parts.chunks(width).skip(group).step_by(groups) {
                    add(&mut of_group, &row[head * channels..][..channels]);
                }
                add(&mut sum, &of_group);
            }
            let scale = 1.0 / self.tokens as f32;
            means.extend(sum.iter().map(|sum| sum * scale));
        }
        state.means = bytemuck::pod_collect_to_vec(&means);
        for (place, head, cluster) in self.places() {
            let (span, index) = (self.span(cluster / self.span_centroids), cluster % self.span_centroids);
            let token = start_token(span.len() as u32, self.span_centroids as u32, index as u32) as usize;
            let key = self.head_of(&self.keys, head, span.start + token);
            let mean = self.mean(state, head);
            let centred = key.iter().zip(&mean).map(|(key, mean)| key - mean);
            self.set_centroid(state, place, &centred.collect::<Vec<_>>(), &mean);
        }
    }

    /// Places of centroids, with their heads and clusters.
    fn places(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let clusters = self.clusters();
        (0..self.kv_heads * clusters).map(move |place| (place, place / clusters, place % clusters))
    }

    fn set_centroid(&self, state: &mut State, place: usize, centroid: &[f32], mean: &[f32]) {
        let words = rounded(centroid);
        state.biases[place] = -self.product(&numbers(&words), mean);
        state.centroids[place * self.head_words..][..self.head_words].copy_from_slice(&words);
    }

    /// Of a word's channels in order; then lanes, which are a power of two, by halves.
    fn product(&self, left: &[f32], right: &[f32]) -> f32 {
        let of_word =
            |(left, right): (&[f32], &[f32])| left.iter().zip(right).fold(0.0, |sum, (l, r)| sum + l * r);
        let mut lanes: Vec<f32> =
            left.chunks(WORD_ELEMENTS).zip(right.chunks(WORD_ELEMENTS)).map(of_word).collect();
        while lanes.len() > 1 {
            let (low, high) = lanes.split_at(lanes.len() / 2);
            lanes = low.iter().zip(high).map(|(low, high)| low + high).collect();
        }
        lanes[0]
    }

    fn assign(&self, state: &mut State, spans: usize, after: &State, exact: bool) -> Result<(), String> {
        let clusters = self.clusters();
        let centroids: Vec<f32> = numbers(&state.centroids);
        let stride = self.tokens.next_multiple_of(4);
        for head in 0..self.kv_heads {
            for token in 0..self.tokens {
                let candidates = if spans == 1 {
                    0..clusters
                } else {
                    let span = (0..spans).find(|span| self.span(*span).contains(&token)).unwrap();
                    span * self.span_centroids..(span + 1) * self.span_centroids
                };
                let key = self.head_of(&self.keys, head, token);
                let centroid =
                    |cluster: usize| &centroids[(head * clusters + cluster) * key.len()..][..key.len()];
                let bias = |cluster: usize| state.biases[head * clusters + cluster];
                let product = |cluster: usize| {
                    key.iter().zip(centroid(cluster)).fold(bias(cluster), |sum, (key, c)| sum + key * c)
                };
                let mut best = (candidates.start, f32::NEG_INFINITY);
                for cluster in candidates.clone() {
                    let product = product(cluster);
                    if product > best.1 {
                        best = (cluster, product);
                    }
                }
                let found = after.assigned[head * stride + token];
                let as_good = |cluster: usize| {
                    let terms = |cluster: usize| {
                        let terms =
                            key.iter().zip(centroid(cluster)).map(|(key, c)| f64::from(*key) * f64::from(*c));
                        terms.chain([f64::from(bias(cluster))]).collect::<Vec<_>>()
                    };
                    let (own, other) = (terms(best.0), terms(cluster));
                    let size: f64 = own.iter().chain(&other).map(|term| term.abs()).sum();
                    (own.iter().sum::<f64>() - other.iter().sum::<f64>()).abs() <= size / f64::from(1 << 18)
                };
                let same = found as usize == best.0;
                if !same && (exact || !candidates.contains(&(found as usize)) || !as_good(found as usize)) {
                    return Err(format!(
                        "head {head}, token {token}: cluster {found} where {} of {candidates:?} was expected",
                        best.0
                    ));
                }
                state.assigned[head * stride + token] = found;
            }
        }
        Ok(())
    }

    /// Clusters of a row's tokens.
    fn assigned<'a>(&self, state: &'a State, head: usize) -> &'a [u32] {
        &state.assigned[head * self.tokens.next_multiple_of(4)..][..self.tokens]
    }

    fn count(&self, state: &mut State) {
        for head in 0..self.kv_heads {
            for token in 0..self.tokens {
                let cluster = self.assigned(state, head)[token] as usize;
                state.sizes[head * self.clusters() + cluster] += 1;
            }
        }
    }

    /// The sum of the members' heads: dealt out to as many sums as heads fit into 32 words, which are added by halves.
    fn sum(&self, tensor: &[u128], head: usize, members: &[usize]) -> Vec<f32> {
        let mut groups = vec![vec![0.0; self.channels()]; 32 / self.head_words];
        let count = groups.len();
        for (rank, member) in members.iter().enumerate() {
            add(&mut groups[rank % count], &self.head_of(tensor, head, *member));
        }
        while groups.len() > 1 {
            let high = groups.split_off(groups.len() / 2);
            groups.iter_mut().zip(&high).for_each(|(low, high)| add(low, high));
        }
        groups.remove(0)
    }

    fn members(&self, state: &State, head: usize, cluster: usize) -> Vec<usize> {
        let assigned = self.assigned(state, head);
        (0..self.tokens).filter(|token| assigned[*token] as usize == cluster).collect()
    }

    fn update(&self, state: &mut State) {
        for (place, head, cluster) in self.places() {
            let members = self.members(state, head, cluster);
            if members.is_empty() {
                continue;
            }
            let mean = self.mean(state, head);
            let scale = 1.0 / members.len() as f32;
            let sum = self.sum(&self.keys, head, &members);
            let mut centroid: Vec<f32> =
                sum.iter().zip(&mean).map(|(sum, mean)| sum * scale - mean).collect();
            let square = self.product(&centroid, &centroid);
            if (f32::MIN_POSITIVE..f32::INFINITY).contains(&square) {
                let length = rsqrt_approx(square);
                centroid.iter_mut().for_each(|channel| *channel *= length);
                self.set_centroid(state, place, &centroid, &mean);
            }
        }
    }

    /// The place of a partition.
    fn place(&self, head: usize, partition: usize) -> usize {
        let segment = self.directories[self.directory + partition / self.segment_partitions] as usize;
        (segment * self.request_rows + self.first_row + head) * self.segment_partitions
            + partition % self.segment_partitions
    }

    /// The place of a row's pages before the run; those after it are behind it.
    fn row_place(&self, head: usize) -> usize {
        2 * (self.first_place + self.first_row + head)
    }

    fn pages(&self, state: &mut State) {
        for head in 0..self.kv_heads {
            let mut page = 0;
            for cluster in 0..self.clusters() {
                let place = head * self.clusters() + cluster;
                state.firsts[place] = page;
                page += state.sizes[place].div_ceil(self.page_tokens as u32);
            }
            let place = self.row_place(head);
            state.row_pages[place] = state.row_pages[place + 1];
            state.row_pages[place + 1] += page;
        }
    }

    fn list(&self, state: &mut State) {
        for (place, head, cluster) in self.places() {
            let members = self.members(state, head, cluster);
            let page = head * self.member_pages() + state.firsts[place] as usize;
            let all = members.len().next_multiple_of(self.page_tokens);
            let listed = &mut state.members[page * self.page_tokens..][..all];
            listed.fill(NO_TOKEN);
            members.iter().zip(listed).for_each(|(member, listed)| *listed = *member as u32);
        }
    }

    /// The pages of the run: their rows, their partitions and their tokens.
    fn run_pages(&self, state: &State) -> Vec<(usize, usize, Vec<u32>)> {
        let of_row = |head: usize| {
            let place = self.row_place(head);
            let (before, after) = (state.row_pages[place] as usize, state.row_pages[place + 1] as usize);
            (before..after).map(move |partition| {
                let listed = (head * self.member_pages() + partition - before) * self.page_tokens;
                (head, partition, state.members[listed..listed + self.page_tokens].to_vec())
            })
        };
        (0..self.kv_heads).flat_map(of_row).collect()
    }

    fn means(&self, state: &mut State) {
        for (head, partition, tokens) in self.run_pages(state) {
            let members: Vec<usize> =
                tokens.iter().filter(|token| **token != NO_TOKEN).map(|token| *token as usize).collect();
            let scale = 1.0 / members.len() as f32;
            let mean = |tensor| {
                rounded(&self.sum(tensor, head, &members).iter().map(|sum| sum * scale).collect::<Vec<_>>())
            };
            let place = self.place(head, partition);
            let words = place * self.head_words..(place + 1) * self.head_words;
            state.summaries[words.clone()].copy_from_slice(&mean(&self.keys));
            state.value_means[words].copy_from_slice(&mean(&self.values));
            state.partition_tokens[place] = members.len() as u32;
        }
    }

    fn store(&self, state: &mut State) {
        let half = self.page_tokens * self.head_words;
        for (head, key, tokens) in self.run_pages(state) {
            let row = self.first_slab + (self.first_row + head) * self.slab_stride;
            let slab = row + key / SLAB_PAGES as usize;
            let to = host_page(self.host_slabs[slab], key as u32) as usize * 2 * half;
            for (tensor, to) in [(&self.keys, to), (&self.values, to + half)] {
                for (at, token) in tokens.iter().enumerate() {
                    let place = &mut state.host_pages[to + at * self.head_words..][..self.head_words];
                    if *token == NO_TOKEN {
                        place.fill(0);
                    } else {
                        place.copy_from_slice(self.words_of(tensor, head, *token as usize));
                    }
                }
            }
            state.host_valid[slab] |= 1 << (key % SLAB_PAGES as usize);
        }
    }
}

fn add(sum: &mut [f32], other: &[f32]) {
    sum.iter_mut().zip(other).for_each(|(sum, other)| *sum += other);
}

/// Numbers of bf16 words.
fn numbers(words: &[u128]) -> Vec<f32> {
    bytemuck::cast_slice::<_, bf16>(words).to_f32_vec()
}

/// Numbers of words of f32.
fn f32s(words: &[u128]) -> Vec<f32> {
    bytemuck::cast_slice(words).to_vec()
}

/// Words of bf16, rounded to nearest even.
fn rounded(numbers: &[f32]) -> Vec<u128> {
    let halves: Vec<bf16> = numbers.iter().map(|number| bf16::from_f32(*number)).collect();
    bytemuck::pod_collect_to_vec(&halves)
}

fn compare<T: PartialEq + std::fmt::Debug>(what: &str, expected: &[T], found: &[T]) -> Result<(), String> {
    assert_eq!(expected.len(), found.len(), "{what}");
    match (0..found.len()).find(|at| expected[*at] != found[*at]) {
        None => Ok(()),
        Some(at) => Err(format!("{what}[{at}]: {:x?} where {:x?} was expected", found[at], expected[at])),
    }
}
