//! The GPU architectures that kernels are built for.

use std::fmt;
use std::str::FromStr;

/// A GPU architecture. PTX of one with an `a` runs on exactly that architecture, other PTX on that and newer ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Ampere (A100), and what newer GPUs without PTX of their own fall back to.
    Sm80,
    /// Hopper (H100, H200) with its warpgroup instructions and bulk copies.
    Sm90a,
    /// Blackwell (B200).
    Sm100a,
}

impl Arch {
    /// All of them, oldest first.
    pub const ALL: [Self; 3] = [Self::Sm80, Self::Sm90a, Self::Sm100a];

    /// As compilers spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
            Self::Sm100a => "sm_100a",
        }
    }

    /// The version of PTX's instruction set, times ten. The oldest that has all of the architecture's instructions
    /// that we use, because a driver refuses PTX newer than itself: 8.0 needs CUDA 12.0, 8.6 needs CUDA 12.7.
    pub const fn ptx_version(self) -> u32 {
        match self {
            Self::Sm80 | Self::Sm90a => 80,
            Self::Sm100a => 86,
        }
    }

    /// Whether it has what came with Hopper, bulk copies among it. Kernel crates are then compiled with `--cfg sm_90`.
    pub const fn has_sm_90(self) -> bool {
        matches!(self, Self::Sm90a | Self::Sm100a)
    }

    /// Whether it has the matrix products of warpgroups, which came and went with Hopper. Kernel crates are then compiled with
    /// `--cfg sm_90a`.
    pub const fn has_wgmma(self) -> bool {
        matches!(self, Self::Sm90a)
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is not one of [`Arch::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no architecture {0:?}; known are {known}", known = Arch::ALL.map(Arch::name).join(", "))]
pub struct UnknownArch(pub String);

impl FromStr for Arch {
    type Err = UnknownArch;

    fn from_str(name: &str) -> Result<Self, UnknownArch> {
        Self::ALL.into_iter().find(|arch| arch.name() == name).ok_or_else(|| UnknownArch(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for arch in Arch::ALL {
            assert_eq!(arch.to_string().parse(), Ok(arch));
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = "sm_90".parse::<Arch>().unwrap_err();
        assert_eq!(error.to_string(), r#"no architecture "sm_90"; known are sm_80, sm_90a, sm_100a"#);
    }
}
