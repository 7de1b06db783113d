//! Output into files, for a library that prints and has no switch for it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// Where Criterion's lines go: its report, and what it says about its progress.
pub struct Aside {
    report: File,
    progress: File,
}

impl Aside {
    /// Makes both files in a folder that exists.
    pub fn new(folder: &Path) -> io::Result<Self> {
        let file = |name| File::create(folder.join(name));
        Ok(Self { report: file("report.txt")?, progress: file("progress.txt")? })
    }

    /// Runs `work`, whose standard output and errors go to the files.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let _output = Redirect::new(libc::STDOUT_FILENO, &self.report)?;
        let _errors = Redirect::new(libc::STDERR_FILENO, &self.progress)?;
        Ok(work())
    }
}

/// A descriptor that leads to another file until this is dropped.
struct Redirect {
    descriptor: RawFd,
    before: OwnedFd,
}

impl Redirect {
    fn new(descriptor: RawFd, file: &File) -> io::Result<Self> {
        io::stdout().flush()?;
        // SAFETY: it names a descriptor and gives a new one, or -1.
        let before = match unsafe { libc::dup(descriptor) } {
            -1 => return Err(io::Error::last_os_error()),
            // SAFETY: new, and nobody else's.
            before => unsafe { OwnedFd::from_raw_fd(before) },
        };
        replace(descriptor, file.as_raw_fd())?;
        Ok(Self { descriptor, before })
    }
}

impl Drop for Redirect {
    fn drop(&mut self) {
        let _ = io::stdout().flush();
        let _ = replace(self.descriptor, self.before.as_raw_fd());
    }
}

fn replace(descriptor: RawFd, with: RawFd) -> io::Result<()> {
    // SAFETY: both are open; what `descriptor` was stays open under another number.
    if unsafe { libc::dup2(with, descriptor) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
