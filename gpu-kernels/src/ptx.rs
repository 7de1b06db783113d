/// The architectures that PTX is built for, newest first.
pub const ARCHITECTURES: &[&str] = &["sm_100a", "sm_90a", "sm_80"];

/// The PTX module of all kernels for one of [`ARCHITECTURES`].
pub fn ptx(architecture: &str) -> Option<&'static str> {
    // The device build makes these files, so it cannot hold them.
    #[cfg(not(target_arch = "nvptx64"))]
    match architecture {
        "sm_80" => return Some(include_str!("../ptx/sm_80.ptx")),
        "sm_90a" => return Some(include_str!("../ptx/sm_90a.ptx")),
        "sm_100a" => return Some(include_str!("../ptx/sm_100a.ptx")),
        _ => {}
    }
    let _ = architecture;
    None
}
