/// The architectures that PTX is built for. One is enough: it runs on everything newer, and nothing in `cuda_std` needs more yet.
pub const ARCHITECTURES: &[&str] = &["sm_80"];

/// The PTX module of all kernels for one of [`ARCHITECTURES`].
pub fn ptx(architecture: &str) -> Option<&'static str> {
    (architecture == "sm_80").then_some(include_str!("../ptx/sm_80.ptx"))
}
