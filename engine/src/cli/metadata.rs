use std::fmt;
use std::sync::Arc;

use clap::Args;
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;
use spinkv::algorithms::{MethodOptions, OwnOptions};
use spinkv::memory::{FlatLayout, HostLayout, KvDtype, PageLayout, RequestPlan, footprint};
use spinkv::paging::SEGMENT_KEYS;
use spinkv::partition::PartitionKind;
use spinkv::pipeline::{Always, Budget, DEFAULT_BUFFERING, Index, KeyStore, Method, Select, SteadyZone};
use spinkv::{KvConfig, KvShape, Rotary};
use spinkv_engine::Result;
use spinkv_engine::config::ModelConfig;

use super::output::Output;
use super::pages::HOST_FORMATS;

/// Bytes of an element of a summary on a GPU: bf16.
const ELEMENT_BYTES: usize = 2;

/// Work out what tables, summaries and pages take, by formula.
///
/// Which pages of which row are on the GPU has to be looked up in every step, so tables that say so lie on the GPU:
/// for each request a directory, segments of 512 page keys that grow with the context, and arrays of the slots of its
/// caches. Where pages are on the host only misses ask, so those tables lie on the host. Beside the sum stands what
/// flat tables take: F1 with one page a partition, F2 with a list of up to M pages a partition. Nothing is allocated,
/// so any size will do.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  spinkv metadata --model qwen3-14b --context 131072 --batch 32 --partition 8
  spinkv metadata --model llama-3.1-70b --budget 2048 --json | jq .gpu_tables
  spinkv metadata --layers 28 --query-heads 16 --kv-heads 8 --head-dim 128 --context 32768 --batch 1")]
pub(crate) struct MetadataArguments {
    /// A model's attention shape: qwen3-8b, qwen3-14b, qwen3-32b, llama-3.1-8b or llama-3.1-70b
    #[arg(long, default_value = "qwen3-14b", value_name = "NAME", value_parser = named_model, help_heading = "Shape")]
    model: NamedModel,

    /// Layers, in place of the model's
    #[arg(long, value_name = "N", help_heading = "Shape")]
    layers: Option<usize>,

    /// Query heads of a layer, in place of the model's
    #[arg(long, value_name = "N", help_heading = "Shape")]
    query_heads: Option<usize>,

    /// KV heads of a layer, in place of the model's; divides the query heads
    #[arg(long, value_name = "N", help_heading = "Shape")]
    kv_heads: Option<usize>,

    /// Elements of one key, in place of the model's
    #[arg(long, value_name = "N", help_heading = "Shape")]
    head_dim: Option<usize>,

    /// Tokens of each request
    #[arg(long, default_value_t = 131_072, value_name = "TOKENS", help_heading = "Load")]
    context: usize,

    /// Requests
    #[arg(long, default_value_t = 32, value_name = "REQUESTS", help_heading = "Load")]
    batch: u64,

    /// Sparse-attention method: dense, streaming-llm, shadowkv, quest or token-topk
    #[arg(long, default_value = "shadowkv", value_name = "NAME", help_heading = "Method")]
    method: String,

    /// An option that only this method has, as NAME=VALUE; may be given more than once
    #[arg(long, value_name = "NAME=VALUE")]
    method_option: Vec<String>,

    /// Tokens of a partition [default: the method's own]
    #[arg(long, value_name = "TOKENS", help_heading = "Method")]
    partition: Option<usize>,

    /// Tokens of a page; divides the partition
    #[arg(long, default_value_t = 8, value_name = "TOKENS", help_heading = "Method")]
    page: usize,

    /// How the host keeps pages: full, fp8 or int8
    #[arg(long, default_value = "full", value_name = "FORMAT", value_parser = HOST_FORMATS, help_heading = "Method")]
    host_kv: String,

    /// What a step selects: tokens (1024), a percentage (1.56%) or a fraction (0.0156) of the context
    #[arg(long, default_value = "1.56%", value_name = "BUDGET", help_heading = "Method")]
    budget: String,

    /// Cache pages beyond those that one step needs, as a multiple of them
    #[arg(long, default_value_t = DEFAULT_BUFFERING, value_name = "RATIO", help_heading = "Method")]
    buffering: f64,

    /// M, the most pages of a partition in the flat layout F2
    #[arg(long, default_value_t = 32, value_name = "PAGES", help_heading = "Method")]
    max_pages: u64,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A model and the name that it was asked for by.
#[derive(Clone, Debug)]
struct NamedModel {
    name: String,
    config: ModelConfig,
}

fn named_model(name: &str) -> std::result::Result<NamedModel, String> {
    let own = "other shapes by --layers, --query-heads, --kv-heads and --head-dim";
    let config = ModelConfig::preset(name).map_err(|error| format!("{error} ({own})"))?;
    Ok(NamedModel { name: name.to_lowercase(), config })
}

/// A method with partitions of another size.
#[derive(Debug)]
struct Resized {
    method: Arc<dyn Method>,
    tokens: usize,
}

impl Method for Resized {
    fn name(&self) -> &str {
        self.method.name()
    }
    fn partition(&self) -> PartitionKind {
        PartitionKind::Chunk { tokens: self.tokens }
    }
    fn index(&self) -> Index<'_> {
        self.method.index()
    }
    fn select(&self) -> Select<'_> {
        self.method.select()
    }
    fn steady(&self) -> SteadyZone {
        self.method.steady()
    }
    fn always(&self) -> Always {
        self.method.always()
    }
    fn keys(&self) -> KeyStore {
        self.method.keys()
    }
}

/// Runs `spinkv metadata`.
pub(crate) fn run(arguments: &MetadataArguments) -> Result<()> {
    let report = Report::new(arguments)?;
    let text = if arguments.json {
        serde_json::to_string_pretty(&report).expect("an account is plain data") + "\n"
    } else {
        report.to_string()
    };
    let mut output = Output::default();
    let _ = output.write(&text);
    output.finish()
}

/// What a batch takes. Bytes, unless a name says otherwise.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    batch: u64,
    method: String,
    /// Only for methods that select.
    budget: Option<String>,
    partition_tokens: usize,
    page_tokens: usize,
    page_bytes: usize,
    rows_per_request: usize,
    partitions_per_row: usize,
    mandatory_pages_per_row: usize,
    buffering_pages_per_row: usize,
    steady_pages_per_row: usize,
    gpu_tables: GpuTables,
    flat: Vec<Flat>,
    gpu_beside: GpuBeside,
    host: Host,
}

/// Every table byte on the GPU.
#[derive(Debug, Serialize)]
struct GpuTables {
    directories: Item,
    segments: Item,
    slot_arrays: Item,
    steady_lists: Item,
    marks: Item,
    total: u64,
}

/// What is on the GPU and no table.
#[derive(Debug, Serialize)]
struct GpuBeside {
    summaries: Item,
    key_coefficients: Item,
    key_bases: Item,
    steady_pages: Item,
    cache_pages: Item,
}

#[derive(Debug, Serialize)]
struct Host {
    page_tables: Item,
    offset_tables: Item,
    pages: Item,
}

#[derive(Debug, Serialize)]
struct Item {
    bytes: u64,
    formula: String,
}

#[derive(Debug, Serialize)]
struct Flat {
    name: &'static str,
    bytes: u64,
    formula: String,
    /// How many times the GPU tables that is.
    ratio: f64,
}

impl Report {
    fn new(arguments: &MetadataArguments) -> Result<Self> {
        let ModelConfig { layers, query_heads, kv_heads, head_dim, .. } = arguments.model.config;
        let explicit = [arguments.layers, arguments.query_heads, arguments.kv_heads, arguments.head_dim];
        let shape = KvShape::new(
            explicit[0].unwrap_or(layers),
            explicit[1].unwrap_or(query_heads),
            explicit[2].unwrap_or(kv_heads),
            explicit[3].unwrap_or(head_dim),
        )?;
        let name = if explicit.iter().any(Option::is_some) { "own shape" } else { &arguments.model.name };
        let budget: Budget = arguments.budget.parse()?;
        let mut own = OwnOptions::default();
        arguments.method_option.iter().try_for_each(|option| own.add(option))?;
        // What it turns is not counted, how wide it is has to fit.
        let rotary = Some(Arc::new(Rotary::new(vec![1.0; shape.head_dim / 2], 1.0)));
        let options = MethodOptions { budget, own, rotary, ..MethodOptions::default() };
        let method = spinkv::algorithms::by_name(&arguments.method, &options)?;
        let method = match arguments.partition {
            Some(tokens) => Arc::new(Resized { method, tokens }),
            None => method,
        };
        let layout = PageLayout::new(arguments.page, shape.head_dim, KvDtype::Bf16)?;
        let pages = HostLayout::new(layout, arguments.host_kv.parse()?)?;
        let config = KvConfig::new(shape, pages, method)?;
        let plan = RequestPlan::new(&config, arguments.context, arguments.buffering)?;

        let batch = arguments.batch;
        let one = footprint(&config, &plan, arguments.context, ELEMENT_BYTES);
        let rows = batch * plan.rows as u64;
        let (segments, longest) = (config.segments(arguments.context), config.segments(plan.max_tokens));
        let (slots, steady) = (plan.row.slots(), plan.row.steady_pages);
        let (page_bytes, slabs) = (layout.page_bytes(), config.host_slabs(arguments.context));
        let (rank, host_page_bytes) =
            (config.low_rank().map_or(0, |low_rank| low_rank.rank), config.host_layout().page_bytes());
        let (width, in_segment) = (config.summary_width(), config.segment_partitions());
        let item = |bytes: u64, formula: String| Item { bytes: batch * bytes, formula };
        let gpu_tables = GpuTables {
            directories: item(one.gpu.directories, format!("{batch} requests x {longest} segments x 8")),
            segments: item(
                one.gpu.segments,
                format!("{rows} rows x {segments} segments x 512 page keys x 2"),
            ),
            slot_arrays: item(
                one.gpu.slot_arrays,
                format!("{rows} rows x (10 x {slots} slots + 16 x {} + 4)", slots.div_ceil(64)),
            ),
            steady_lists: item(one.gpu.steady_lists, format!("{rows} rows x (4 x {steady} pages + 8)")),
            marks: item(
                one.gpu.marks,
                format!("{rows} rows x {} words x 4", config.mark_words(plan.max_tokens)),
            ),
            total: batch * one.gpu.tables(),
        };
        let partitions = arguments.context.div_ceil(config.partition_tokens());
        let flat = |name, layout: FlatLayout, entry: String| {
            let bytes = layout.bytes(batch, plan.rows as u64, partitions as u64);
            let formula = format!("{rows} rows x {partitions} partitions x {entry}");
            Flat { name, bytes, formula, ratio: bytes as f64 / gpu_tables.total as f64 }
        };
        let max_pages = arguments.max_pages;
        let lists = FlatLayout::PageLists { max_pages };
        let flat = vec![
            flat("F1", FlatLayout::OnePage, "(4 slot + 4 GPU page + 4 host page + 8 host offset)".to_owned()),
            flat(
                "F2",
                lists,
                format!("(4 slot + 4 M GPU pages + 4 M host pages + 8 host offset), M = {max_pages}"),
            ),
        ];
        Ok(Self {
            model: name.to_owned(),
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            context: arguments.context,
            batch,
            method: config.method().name().to_owned(),
            budget: config.method().select().budget().map(|budget| budget.to_string()),
            partition_tokens: config.partition_tokens(),
            page_tokens: layout.page_tokens(),
            page_bytes,
            rows_per_request: plan.rows,
            partitions_per_row: partitions,
            mandatory_pages_per_row: plan.row.mandatory_pages,
            buffering_pages_per_row: plan.row.buffering_pages,
            steady_pages_per_row: steady,
            flat,
            gpu_beside: GpuBeside {
                summaries: item(
                    one.gpu.summaries,
                    format!(
                        "{rows} rows x {segments} segments x {in_segment} partitions x {width} x {ELEMENT_BYTES}"
                    ),
                ),
                key_coefficients: item(
                    one.gpu.key_coefficients,
                    format!(
                        "{batch} requests x {segments} segments x {} tokens x {} layers x rank {rank} x {ELEMENT_BYTES}",
                        SEGMENT_KEYS * layout.page_tokens(),
                        shape.layers
                    ),
                ),
                key_bases: item(
                    one.gpu.key_bases,
                    format!("{rows} rows x rank {rank} x {} x {ELEMENT_BYTES}", shape.head_dim),
                ),
                steady_pages: item(
                    one.gpu.steady_pages,
                    format!("{rows} rows x {steady} pages x {page_bytes}"),
                ),
                cache_pages: item(one.gpu.cache_pages, format!("{rows} rows x {slots} pages x {page_bytes}")),
            },
            host: Host {
                page_tables: item(one.host.page_tables, format!("{rows} rows x (6 x {slabs} slabs + 4)")),
                offset_tables: item(one.host.offset_tables, "only clusters need offsets".to_owned()),
                pages: item(
                    one.host.pages,
                    format!("{rows} rows x {slabs} slabs x 16 pages x {host_page_bytes}"),
                ),
            },
            gpu_tables,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |number: usize| HumanCount(number as u64);
        writeln!(
            f,
            "{}: {} layers x {} KV heads = {} rows a request, head width {}; {} requests of {} tokens",
            self.model,
            self.layers,
            self.kv_heads,
            self.rows_per_request,
            self.head_dim,
            self.batch,
            count(self.context)
        )?;
        let budget = self.budget.as_ref().map(|budget| format!(", budget {budget}")).unwrap_or_default();
        writeln!(
            f,
            "{}{budget}: partitions of {} tokens on pages of {} tokens ({})",
            self.method,
            self.partition_tokens,
            self.page_tokens,
            HumanBytes(self.page_bytes as u64)
        )?;
        writeln!(
            f,
            "a row: {} partitions; mandatory {} + buffering {} slots, steady {} pages\n",
            count(self.partitions_per_row),
            count(self.mandatory_pages_per_row),
            count(self.buffering_pages_per_row),
            count(self.steady_pages_per_row)
        )?;
        let line = |f: &mut fmt::Formatter<'_>, name: &str, item: &Item| {
            writeln!(f, "  {name:<14}{:>12}   {}", HumanBytes(item.bytes).to_string(), item.formula)
        };
        let tables = &self.gpu_tables;
        writeln!(f, "tables on the GPU")?;
        line(f, "directories", &tables.directories)?;
        line(f, "segments", &tables.segments)?;
        line(f, "slot arrays", &tables.slot_arrays)?;
        line(f, "steady lists", &tables.steady_lists)?;
        line(f, "marks", &tables.marks)?;
        writeln!(f, "  {:<14}{:>12}", "all", HumanBytes(tables.total).to_string())?;
        writeln!(f, "\nflat tables, to compare")?;
        for flat in &self.flat {
            let size = HumanBytes(flat.bytes).to_string();
            writeln!(f, "  {:<14}{size:>12}   {:.1}x; {}", flat.name, flat.ratio, flat.formula)?;
        }
        writeln!(f, "\nbeside the tables on the GPU")?;
        line(f, "summaries", &self.gpu_beside.summaries)?;
        if self.gpu_beside.key_bases.bytes > 0 {
            line(f, "coefficients", &self.gpu_beside.key_coefficients)?;
            line(f, "bases of keys", &self.gpu_beside.key_bases)?;
        }
        line(f, "steady zone", &self.gpu_beside.steady_pages)?;
        line(f, "caches", &self.gpu_beside.cache_pages)?;
        writeln!(f, "\non the host")?;
        line(f, "page tables", &self.host.page_tables)?;
        line(f, "offset tables", &self.host.offset_tables)?;
        line(f, "pages", &self.host.pages)
    }
}
