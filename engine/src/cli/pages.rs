use clap::Args;
use spinkv::memory::KvDtype;
use spinkv_engine::Result;
use spinkv_engine::pages::PageOptions;

/// How KV pages are made, as commands take it.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Memory")]
pub(super) struct PageArguments {
    /// Tokens of a KV page; divides every method's partition (8 for shadowkv)
    #[arg(long, default_value_t = 8, value_name = "TOKENS")]
    page_tokens: usize,

    /// How KV pages store their elements; on a GPU bf16
    #[arg(long, default_value = "bf16", value_name = "TYPE", value_parser = ["bf16", "f32"])]
    kv_dtype: String,

    /// How the host keeps KV pages: full, as the GPU has them; or a byte an element with scales by page, half of what a miss moves: fp8 (e4m3) or int8
    #[arg(long, default_value = "full", value_name = "FORMAT", value_parser = HOST_FORMATS)]
    host_kv: String,
}

/// What `--host-kv` takes.
pub(super) const HOST_FORMATS: [&str; 3] = ["full", "fp8", "int8"];

impl PageArguments {
    pub fn options(&self) -> Result<PageOptions> {
        Ok(PageOptions {
            tokens: self.page_tokens,
            dtype: dtype(&self.kv_dtype),
            host: self.host_kv.parse()?,
        })
    }
}

/// The element type of a name that was checked.
pub(super) fn dtype(name: &str) -> KvDtype {
    if name == "f32" { KvDtype::F32 } else { KvDtype::Bf16 }
}
