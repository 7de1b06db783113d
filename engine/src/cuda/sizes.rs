use spinkv_kernels::abi::WORD_ELEMENTS;

use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// What the driver hands memory out by: an allocation may take up to this much more than it holds.
const GRANULE: u64 = 2 << 20;

/// The shapes of a model's weights on a GPU, all `[outputs, inputs]` row-major, checked: what passes here, the kernels take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightSizes {
    /// Layers.
    pub layers: usize,
    /// Rows of the embedding and the head.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of all query heads of a layer.
    pub queries: usize,
    /// Width of all key heads of a layer, and of all value heads.
    pub keys: usize,
    /// Width of the gated MLP.
    pub mlp: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Whether there are norms of query and key heads.
    pub head_norms: bool,
    /// Whether the embedding is the head.
    pub tied: bool,
}

/// Bytes of a model's weights, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightBytes {
    /// The embedding.
    pub embedding: u64,
    /// The matrices of all layers.
    pub layers: u64,
    /// The output head; 0 where it is the embedding.
    pub head: u64,
    /// All norms, in f32.
    pub norms: u64,
}

impl WeightBytes {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.embedding + self.layers + self.head + self.norms
    }
}

impl WeightSizes {
    /// Works the shapes out.
    ///
    /// # Errors
    /// [`Error::UnsupportedOnGpu`] for a head width that the kernels do not have, or a width that is no multiple of 8.
    pub fn new(config: &ModelConfig) -> Result<Self> {
        let refused = |field, value, supported| Err(Error::UnsupportedOnGpu { field, value, supported });
        if ![64, 128].contains(&config.head_dim) {
            return refused("head_dim", config.head_dim, "64, 128");
        }
        for (field, value) in [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("vocab_size", config.vocab_size),
        ] {
            if !value.is_multiple_of(WORD_ELEMENTS) {
                return refused(field, value, "multiples of 8");
            }
        }
        Ok(Self {
            layers: config.layers,
            vocab: config.vocab_size,
            hidden: config.hidden_size,
            queries: config.query_heads * config.head_dim,
            keys: config.kv_heads * config.head_dim,
            mlp: config.intermediate_size,
            head_dim: config.head_dim,
            head_norms: config.has_qk_norm(),
            tied: config.tie_word_embeddings,
        })
    }

    /// Query, key and value projections, one below the other.
    pub fn qkv(&self) -> [usize; 2] {
        [self.queries + 2 * self.keys, self.hidden]
    }

    /// The projection of attention's output.
    pub fn output(&self) -> [usize; 2] {
        [self.hidden, self.queries]
    }

    /// The MLP's gate, and below it its up projection.
    pub fn gate_up(&self) -> [usize; 2] {
        [2 * self.mlp, self.hidden]
    }

    /// The MLP's down projection.
    pub fn down(&self) -> [usize; 2] {
        [self.hidden, self.mlp]
    }

    /// The embedding, and the head.
    pub fn embedding(&self) -> [usize; 2] {
        [self.vocab, self.hidden]
    }

    /// Words of a matrix of this shape.
    pub(super) fn words([rows, columns]: [usize; 2]) -> usize {
        rows * columns / WORD_ELEMENTS
    }

    /// Words of the largest matrix of a layer.
    pub(super) fn widest_layer_words(&self) -> usize {
        self.matrices().map(Self::words).into_iter().max().unwrap_or(0)
    }

    fn matrices(&self) -> [[usize; 2]; 4] {
        [self.qkv(), self.output(), self.gate_up(), self.down()]
    }

    /// Bytes, by kind.
    pub fn bytes(&self) -> WeightBytes {
        let embedding = bytes(self.embedding());
        let head_norms = if self.head_norms { 2 * self.head_dim } else { 0 };
        let norms = self.layers * (2 * self.hidden + head_norms) + self.hidden;
        WeightBytes {
            embedding,
            layers: self.layers as u64 * self.matrices().map(bytes).iter().sum::<u64>(),
            head: if self.tied { 0 } else { embedding },
            norms: (norms * size_of::<f32>()) as u64,
        }
    }

    /// The GPU memory that they take, at most: each matrix in whole granules of the driver, and the norms together, which are small
    /// and share some.
    pub fn gpu_bytes(&self) -> u64 {
        let granules = |bytes: u64| bytes.next_multiple_of(GRANULE);
        let layer: u64 = self.matrices().map(|shape| granules(bytes(shape))).iter().sum();
        let ends = if self.tied { 1 } else { 2 };
        self.layers as u64 * layer
            + ends * granules(bytes(self.embedding()))
            + granules(2 * self.bytes().norms)
    }
}

/// Of a matrix in bf16.
fn bytes([rows, columns]: [usize; 2]) -> u64 {
    2 * rows as u64 * columns as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PRESETS;

    /// Two bytes a published parameter, and two more for each of the norms', which are f32.
    #[test]
    fn presets_take_two_bytes_a_parameter() {
        let published = [8_190_735_360, 14_768_307_200, 32_762_123_264, 8_030_261_248, 70_553_706_496];
        for (name, published) in PRESETS.into_iter().zip(published) {
            let sizes = WeightSizes::new(&ModelConfig::preset(name).unwrap()).unwrap();
            let bytes = sizes.bytes();
            assert_eq!(bytes.total(), 2 * published + bytes.norms / 2, "{name}");
            let most = bytes.total() + ((4 * sizes.layers + 3) as u64) * GRANULE + bytes.norms;
            assert!((bytes.total()..most).contains(&sizes.gpu_bytes()), "{name}: {}", sizes.gpu_bytes());
        }
    }

    #[test]
    fn shapes_of_qwen3_14b() {
        let mut config = ModelConfig::preset("qwen3-14b").unwrap();
        let sizes = WeightSizes::new(&config).unwrap();
        assert_eq!((sizes.qkv(), sizes.output()), ([7168, 5120], [5120, 5120]));
        assert_eq!((sizes.gate_up(), sizes.down()), ([34_816, 5120], [5120, 17_408]));
        assert_eq!(sizes.embedding(), [151_936, 5120]);
        let bytes = sizes.bytes();
        assert_eq!((bytes.embedding, bytes.head), (1_555_824_640, 1_555_824_640));
        assert_eq!(bytes.norms, 4 * (40 * (2 * 5120 + 256) + 5120));
        config.tie_word_embeddings = true;
        let tied = WeightSizes::new(&config).unwrap();
        assert_eq!((tied.bytes().head, bytes.total() - tied.bytes().total()), (0, bytes.head));
        assert!(sizes.gpu_bytes() - tied.gpu_bytes() >= bytes.head);
    }

    #[test]
    fn what_the_kernels_do_not_take_is_named() {
        let with = |change: fn(&mut ModelConfig)| {
            let mut config = ModelConfig::preset("qwen3-8b").unwrap();
            change(&mut config);
            WeightSizes::new(&config).unwrap_err().to_string()
        };
        assert_eq!(with(|config| config.head_dim = 96), "head_dim is 96; on a GPU supported: 64, 128");
        let multiple = |field, value| format!("{field} is {value}; on a GPU supported: multiples of 8");
        assert_eq!(with(|config| config.hidden_size = 4100), multiple("hidden_size", 4100));
        assert_eq!(with(|config| config.intermediate_size = 12), multiple("intermediate_size", 12));
        assert_eq!(with(|config| config.vocab_size = 50_257), multiple("vocab_size", 50_257));
    }
}
