//! `linear_8`, `linear_16`, `gemm` and `gemm_wgmma`.

use std::error::Error;

use half::bf16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cuda::blas::{BlasError, BlasLt, Product, ProductOut};
use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, Result as DriverResult, Stream};
use spinkv::backend::cuda::kernels::{Kernels, Linear, LinearOutput, LinearVariant};
use spinkv::memory::Word;
use spinkv_kernels::abi::{WORD_BYTES, WORD_ELEMENTS};

use crate::attend::random_word;
use crate::measure::{Bench, Shape};

/// Linear layers of Qwen3-14B: name, rows and columns of the weights.
const LAYERS: [(&str, usize, usize); 5] = [
    ("qkv", 7168, 5120),
    ("o", 5120, 5120),
    ("gate_up", 34_816, 5120),
    ("down", 5120, 17_408),
    ("head", 151_936, 5120),
];
/// Bytes that the sets of a replay read at least, each once: several times the L2.
const APART: usize = 512 << 20;
/// Words of a run that fills a tensor by being repeated: the host knows every element without holding them all. No multiple of a row.
const RUN: usize = 1_000_003;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    bench.group(
        "linear: layers of Qwen3-14B; bytes: weights; ceiling: device to device, read + written (the kernels hardly write)",
    );
    let (stream, words) = (bench.stream.clone(), (512 << 20) / WORD_BYTES);
    let (from, to) =
        (DeviceBuffer::<Word>::zeroed(&stream, words)?, DeviceBuffer::<Word>::zeroed(&stream, words)?);
    let bytes = 2 * from.bytes();
    let ceiling = bench.row("copy", "512 MiB", bytes, None, |_| to.copy_from(&stream, 0, &from, 0, words))?;
    drop((from, to));

    let operands = Operands::new(bench)?;
    for layer in LAYERS {
        let sets = APART.div_ceil(bytes_of(layer));
        let weights = operands.weights(&bench.stream, layer, sets)?;
        for tokens in [1, 8, 16, 32, 64] {
            operands.row(bench, layer, &weights, tokens, ceiling)?;
        }
    }
    let blas = match BlasLt::load(&bench.context) {
        Ok(blas) => Some(blas),
        Err(missing) => {
            println!("cublaslt: not timed, {missing}");
            None
        }
    };
    for tokens in [1, 8, 16, 32, 64] {
        for overlaps in [false, true] {
            operands.layer_row(bench, tokens, overlaps, ceiling)?;
        }
        if let Some(blas) = &blas {
            operands.blas_layer_row(bench, blas, tokens, ceiling)?;
        }
    }
    bench.group("gemm: layers of Qwen3-14B, 8,192 tokens; bytes: each matrix once");
    for layer in &LAYERS[..4] {
        operands.gemm_row(bench, *layer, LinearVariant::Mma)?;
        if Linear::variant(&bench.kernels, MANY) == LinearVariant::Wgmma {
            operands.gemm_row(bench, *layer, LinearVariant::Wgmma)?;
        }
        if let Some(blas) = &blas {
            operands.blas_row(bench, blas, *layer)?;
        }
    }
    Ok(())
}

/// Tokens of a long prompt.
const MANY: u32 = 8192;

/// What all layers read and write.
struct Operands {
    run: Vec<[bf16; WORD_ELEMENTS]>,
    /// For the widest layer and the most tokens.
    x: DeviceBuffer<Word>,
    bf16: DeviceBuffer<Word>,
    f32: DeviceBuffer<f32>,
    partials: DeviceBuffer<Word>,
    arrivals: DeviceBuffer<u32>,
}

impl Operands {
    fn new(bench: &Bench) -> Result<Self, Box<dyn Error>> {
        let stream = &bench.stream;
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let run: Vec<_> = (0..RUN).map(|_| random_word(&mut rng)).collect();
        let widest = |of: fn(&(&str, usize, usize)) -> usize| LAYERS.iter().map(of).max().unwrap_or(0);
        let (n, k) = (widest(|layer| layer.1), widest(|layer| layer.2));
        let many = MANY as usize;
        Ok(Self {
            x: filled(stream, &run, many * k / WORD_ELEMENTS)?,
            run,
            bf16: DeviceBuffer::zeroed(stream, many * LAYERS[2].1 / WORD_ELEMENTS)?,
            f32: DeviceBuffer::zeroed(stream, 64 * n)?,
            partials: DeviceBuffer::zeroed(stream, Linear::partials(&bench.kernels))?,
            arrivals: DeviceBuffer::zeroed(stream, Linear::arrivals(n as u32))?,
        })
    }

    /// Weights of `sets` sets of a layer.
    fn weights(
        &self,
        stream: &Stream,
        (_, n, k): (&str, usize, usize),
        sets: usize,
    ) -> DriverResult<Vec<DeviceBuffer<Word>>> {
        (0..sets).map(|_| filled(stream, &self.run, n * k / WORD_ELEMENTS)).collect()
    }

    /// A launch as a model's step has it: layers that end a residual block add to it.
    fn launch<'a>(
        &'a self,
        weights: &'a DeviceBuffer<Word>,
        (name, n, k): (&str, usize, usize),
        tokens: u32,
        overlaps: bool,
    ) -> Linear<'a> {
        let output = match name {
            "o" | "down" => LinearOutput::AddF32(&self.f32),
            "gate_up" => LinearOutput::GatedBf16(&self.bf16),
            "head" => LinearOutput::F32(&self.f32),
            _ => LinearOutput::Bf16(&self.bf16),
        };
        let (n, k_words) = (n as u32, (k / WORD_ELEMENTS) as u32);
        let Self { x, partials, arrivals, .. } = self;
        Linear { weights, x, tokens, n, k_words, output, partials, arrivals, overlaps }
    }

    fn row(
        &self,
        bench: &mut Bench,
        layer: (&str, usize, usize),
        weights: &[DeviceBuffer<Word>],
        tokens: u32,
        ceiling: f64,
    ) -> Result<(), Box<dyn Error>> {
        let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
        let (name, n, k) = layer;
        self.check(&kernels, &stream, &weights[0], layer, tokens, LinearVariant::Stream)?;
        let shape = Shape::new(format!("{name}, {n} x {k}, {tokens} tokens"));
        bench.graph_row(
            "linear",
            shape,
            bytes_of(layer) as u64,
            Some(ceiling),
            weights.len(),
            |_| Ok(()),
            // SAFETY: arrivals are 0 between launches; launches on one stream follow each other.
            |stream, set| unsafe {
                self.launch(&weights[set], layer, tokens, false).launch(&kernels, stream)
            },
        )?;
        Ok(())
    }

    /// The four layers of a transformer's layer one after another.
    fn layer_row(
        &self,
        bench: &mut Bench,
        tokens: u32,
        overlaps: bool,
        ceiling: f64,
    ) -> Result<(), Box<dyn Error>> {
        let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
        let layers = &LAYERS[..4];
        let bytes: usize = layers.iter().map(|layer| bytes_of(*layer)).sum();
        // Within a set each layer's weights are read once in 661 MB: no line of them is in the L2 any more.
        let sets = 4;
        let weights: Vec<_> =
            layers.iter().map(|layer| self.weights(&stream, *layer, sets)).collect::<Result<_, _>>()?;
        let with = if overlaps { "overlapping" } else { "one after another" };
        let shape = Shape::new(format!("qkv, o, gate_up, down, {tokens} tokens, {with}"));
        bench.graph_row(
            "linear, layer",
            shape,
            bytes as u64,
            Some(ceiling),
            sets,
            |_| Ok(()),
            |stream, set| {
                layers.iter().zip(&weights).try_for_each(|(layer, weights)| {
                    let launch = self.launch(&weights[set], *layer, tokens, overlaps);
                    // SAFETY: as above; nothing writes weights.
                    unsafe { launch.launch(&kernels, stream) }
                })
            },
        )?;
        Ok(())
    }

    /// The same four by cuBLASLt; the gate's activation is another kernel's there and is not timed.
    fn blas_layer_row(
        &self,
        bench: &mut Bench,
        blas: &BlasLt,
        tokens: u32,
        ceiling: f64,
    ) -> Result<(), Box<dyn Error>> {
        let stream = bench.stream.clone();
        let layers = &LAYERS[..4];
        let bytes: usize = layers.iter().map(|layer| bytes_of(*layer)).sum();
        let sets = 4;
        let weights: Vec<_> =
            layers.iter().map(|layer| self.weights(&stream, *layer, sets)).collect::<Result<_, _>>()?;
        let launch = |stream: &Stream, set: usize| {
            layers.iter().zip(&weights).try_for_each(|(layer, weights)| {
                blas.product(stream, &self.product(&weights[set], *layer, tokens))
            })
        };
        // Plans and loads what a capture cannot.
        launch(&stream, 0)?;
        let shape = Shape::new(format!("qkv, o, gate_up, down, {tokens} tokens"));
        bench.graph_row(
            "cublaslt, layer",
            shape,
            bytes as u64,
            Some(ceiling),
            sets,
            |_| Ok(()),
            |stream, set| launch(stream, set).map_err(of_driver),
        )?;
        Ok(())
    }

    fn blas_row(
        &self,
        bench: &mut Bench,
        blas: &BlasLt,
        layer: (&str, usize, usize),
    ) -> Result<(), Box<dyn Error>> {
        let stream = bench.stream.clone();
        let (name, n, k) = layer;
        let weights = self.weights(&stream, layer, 1)?;
        let many = MANY as usize;
        let bytes = 2 * (n * k + many * k + many * n);
        let shape = Shape::new(format!("{name}, {n} x {k}, {MANY} tokens"));
        let shape = shape.flops(2 * (n * k * many) as u64);
        let out = ProductOut::Bf16(&self.bf16);
        let product = Product { out, ..self.product(&weights[0], layer, MANY) };
        blas.product(&stream, &product)?;
        bench.row("cublaslt", shape, bytes as u64, None, |_| {
            blas.product(&stream, &product).map_err(of_driver)
        })?;
        Ok(())
    }

    fn product<'a>(
        &'a self,
        weights: &'a DeviceBuffer<Word>,
        (name, n, k): (&str, usize, usize),
        tokens: u32,
    ) -> Product<'a> {
        let out = match name {
            "o" | "down" => ProductOut::AddF32(&self.f32),
            _ => ProductOut::Bf16(&self.bf16),
        };
        let tokens = tokens as usize;
        Product { tokens, n, k, x: &self.x, x_first_token: 0, weights, out, out_first_token: 0 }
    }

    fn gemm_row(
        &self,
        bench: &mut Bench,
        layer: (&str, usize, usize),
        variant: LinearVariant,
    ) -> Result<(), Box<dyn Error>> {
        let (kernels, stream) = (bench.kernels.clone(), bench.stream.clone());
        let (name, n, k) = layer;
        let weights = self.weights(&stream, layer, 1)?;
        self.check(&kernels, &stream, &weights[0], layer, MANY, variant)?;
        let many = MANY as usize;
        let bytes = 2 * (n * k + many * k + many * n);
        let shape = Shape::new(format!("{name}, {n} x {k}, {MANY} tokens"));
        let shape = shape.flops(2 * (n * k * many) as u64);
        let what = if variant == LinearVariant::Wgmma { "gemm_wgmma" } else { "gemm" };
        bench.row(what, shape, bytes as u64, None, |_| {
            let launch = self.launch_bf16(&weights[0], layer, MANY);
            // SAFETY: launches on one stream follow each other.
            unsafe { launch.launch_as(variant, &kernels, &stream) }
        })?;
        Ok(())
    }

    /// A launch that stores plain bf16, which every number of tokens has room for.
    fn launch_bf16<'a>(
        &'a self,
        weights: &'a DeviceBuffer<Word>,
        layer: (&str, usize, usize),
        tokens: u32,
    ) -> Linear<'a> {
        let output = LinearOutput::Bf16(&self.bf16);
        Linear { output, ..self.launch(weights, layer, tokens, false) }
    }

    /// Refuses to time a wrong result: of some tokens some products against f64.
    fn check(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        weights: &DeviceBuffer<Word>,
        layer: (&str, usize, usize),
        tokens: u32,
        variant: LinearVariant,
    ) -> Result<(), Box<dyn Error>> {
        let (name, n, k) = layer;
        // SAFETY: as above.
        unsafe { self.launch_bf16(weights, layer, tokens).launch_as(variant, kernels, stream)? };
        let element = |row: usize, at: usize| {
            let element = row * k + at;
            f64::from(self.run[element / WORD_ELEMENTS % RUN][element % WORD_ELEMENTS].to_f32())
        };
        for token in (0..tokens as usize).step_by(1 + tokens as usize / 5) {
            let mut words = vec![0; n / WORD_ELEMENTS];
            self.bf16.read(stream, token * n / WORD_ELEMENTS, &mut words)?;
            let found: &[bf16] = bytemuck::cast_slice(&words);
            let (mut off, mut norm) = (0.0, 0.0);
            for row in (token % 61..n).step_by(n / 61) {
                let right: f64 = (0..k).map(|at| element(row, at) * element(token, at)).sum();
                off += (f64::from(found[row].to_f32()) - right).powi(2);
                norm += right.powi(2);
            }
            if off.sqrt() > 5e-3 * norm.sqrt() {
                return Err(format!("{name}, token {token}: off by {} of {}", off.sqrt(), norm.sqrt()).into());
            }
        }
        Ok(())
    }
}

/// What a timed launch may say; the rest was found out before.
fn of_driver(error: BlasError) -> DriverError {
    match error {
        BlasError::Driver(error) => error,
        other => panic!("{other}"),
    }
}

/// Bytes of a layer's weights.
fn bytes_of((_, n, k): (&str, usize, usize)) -> usize {
    n * k / WORD_ELEMENTS * WORD_BYTES
}

/// A tensor of so many words of the run.
fn filled(stream: &Stream, run: &[[bf16; WORD_ELEMENTS]], words: usize) -> DriverResult<DeviceBuffer<Word>> {
    let tensor = DeviceBuffer::uninit(stream.context(), words)?;
    for at in (0..words).step_by(run.len()) {
        tensor.write(stream, at, bytemuck::cast_slice(&run[..run.len().min(words - at)]))?;
    }
    Ok(tensor)
}
