/// The architectures that PTX is built for. What runs on sm_80 is in its module alone, which all newer ones run; the others hold the cases
/// that need more ([`Case::needs`](crate::Case::needs)).
pub const ARCHITECTURES: &[&str] = &["sm_100a", "sm_90a", "sm_80"];

/// The PTX module of one of [`ARCHITECTURES`].
pub fn ptx(architecture: &str) -> Option<&'static str> {
    match architecture {
        "sm_80" => Some(include_str!("../ptx/sm_80.ptx")),
        "sm_90a" => Some(include_str!("../ptx/sm_90a.ptx")),
        "sm_100a" => Some(include_str!("../ptx/sm_100a.ptx")),
        _ => None,
    }
}
