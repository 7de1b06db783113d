//! ptxas without a CUDA toolkit: NVIDIA's wheel on PyPI has it.

use std::fs;
use std::path::Path;
use std::process::Command;

use cuda_builder::Ptxas;

use crate::Outcome;

/// The ptxas of gpu-kernels/ptx/manifest.toml, of the CUDA of the driver that we test on.
const WHEEL: &str = "nvidia-cuda-nvcc==13.0.88";

/// Unpacks the one file that is wanted, from the one wheel in a folder.
const UNPACK: &str = "import glob, sys, zipfile
folder, member = sys.argv[1:]
wheel, = glob.glob(folder + '/*.whl')
zipfile.ZipFile(wheel).extract(member, folder)";

const PTXAS: &str = "nvidia/cu13/bin/ptxas";

/// Whether [`ptxas()`] has been here.
pub fn is_there() -> bool {
    Path::new("target/nvidia").join(PTXAS).is_file()
}

/// Puts ptxas where [`Ptxas::find`] looks for it.
pub fn ptxas() -> Outcome {
    let folder = Path::new("target/nvidia");
    fs::create_dir_all(folder)?;
    // Downloaded beside it, so that what was broken off does not look like a ptxas.
    let download = tempfile::tempdir_in(folder)?;
    eprintln!("xtask: getting {WHEEL} from PyPI");
    let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", WHEEL, "--dest"];
    python(Command::new("python3").args(pip).arg(download.path()))?;
    python(Command::new("python3").args(["-c", UNPACK]).arg(download.path()).arg(PTXAS))?;
    let unpacked = download.path().join(PTXAS);
    make_executable(&unpacked)?;
    let wanted = folder.join(PTXAS);
    fs::create_dir_all(wanted.parent().ok_or("no folder")?)?;
    fs::rename(unpacked, &wanted)?;
    let version = Ptxas::at(&wanted)?.version().to_owned();
    eprintln!("xtask: ptxas {version} is in {}", wanted.display());
    Ok(())
}

fn python(command: &mut Command) -> Outcome {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!(
            "python3 could not get {WHEEL} ({status}); it needs pip: apt-get install python3-pip"
        )
        .into()),
        Err(error) => Err(format!("python3 did not start: {error}; apt-get install python3-pip").into()),
    }
}

#[cfg(unix)]
fn make_executable(file: &Path) -> Outcome {
    use std::os::unix::fs::PermissionsExt;
    // Wheels do not keep it.
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> Outcome {
    Ok(())
}
