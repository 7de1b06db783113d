use std::io::{self, ErrorKind, Write};
use std::ops::ControlFlow;

use spinkv_engine::{Error, Result};

/// Standard output. Remembers what went wrong, since text is written from where no error can be returned.
#[derive(Default)]
pub(super) struct Output {
    error: Option<io::Error>,
}

impl Output {
    pub fn write(&mut self, text: &str) -> ControlFlow<()> {
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.error.get_or_insert(error);
                ControlFlow::Break(())
            }
        }
    }

    /// A closed pipe is the reader's way to say that it has enough; any other failure lost what was asked for.
    pub fn finish(self) -> Result<()> {
        match self.error {
            Some(source) if source.kind() != ErrorKind::BrokenPipe => {
                Err(Error::Io { path: "standard output".into(), source })
            }
            _ => Ok(()),
        }
    }
}
