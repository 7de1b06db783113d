//! Running other programs.

use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

/// A program that did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started.
    #[error("{tool:?} did not start: {source}")]
    Start {
        /// As it was called.
        tool: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ran and failed.
    #[error("{tool:?} failed ({status}):\n{stderr}")]
    Failed {
        /// As it was called.
        tool: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
}

/// What a program that succeeded wrote.
pub(crate) struct Written {
    pub stdout: String,
    pub stderr: String,
}

/// Runs `command` to its end.
pub(crate) fn run(command: &mut Command) -> Result<Written, ToolError> {
    let tool = || PathBuf::from(command.get_program());
    let (tool, output) = (tool(), command.output());
    let output = output.map_err(|source| ToolError::Start { tool: tool.clone(), source })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    if output.status.success() {
        Ok(Written { stdout, stderr })
    } else {
        // ptxas writes errors to either stream.
        let stderr = if stderr.is_empty() { stdout } else { stderr };
        Err(ToolError::Failed { tool, status: output.status, stderr })
    }
}

/// Whether a variable of the environment stays for cargo and rustc. Those that an outer `cargo run` or a user's shell
/// sets for host builds go; where cargo keeps its files and how it reaches the network stays.
pub(crate) fn inherited(name: &str) -> bool {
    const KEPT: [&str; 5] =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRY_", "CARGO_REGISTRIES_"];
    const DROPPED: [&str; 6] = ["CARGO", "RUSTC", "RUSTFLAGS", "RUSTDOC", "RUSTUP_TOOLCHAIN", "MAKEFLAGS"];
    KEPT.iter().any(|kept| name.starts_with(kept)) || !DROPPED.iter().any(|dropped| name.starts_with(dropped))
}

/// A command without the variables that are not [`inherited`].
pub(crate) fn clean_command(program: &std::path::Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if !name.to_str().is_none_or(inherited) {
            command.env_remove(name);
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_settings_do_not_reach_the_device_build() {
        for name in [
            "CARGO",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "CARGO_PKG_NAME",
            "RUSTC",
            "RUSTC_WRAPPER",
        ] {
            assert!(!inherited(name), "{name}");
        }
        for name in
            ["RUSTFLAGS", "RUSTDOCFLAGS", "RUSTUP_TOOLCHAIN", "CARGO_PROFILE_RELEASE_LTO", "CARGO_MAKEFLAGS"]
        {
            assert!(!inherited(name), "{name}");
        }
        for name in ["PATH", "HOME", "CARGO_HOME", "CARGO_HTTP_CAINFO", "CARGO_NET_OFFLINE", "RUSTUP_HOME"] {
            assert!(inherited(name), "{name}");
        }
    }

    #[test]
    fn a_failure_carries_what_the_tool_said() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).err().unwrap();
        assert!(matches!(&error, ToolError::Failed { stderr, .. } if stderr == "broken"), "{error}");
        let error = run(&mut Command::new("/nonexistent/llc")).err().unwrap();
        assert!(error.to_string().starts_with(r#""/nonexistent/llc" did not start"#), "{error}");
    }
}
