//! A method's own operators: whether it has any, and those that were loaded.

use super::super::driver::Stream;
use super::super::operators::{GpuIndex, GpuSelect, LoadIndex, LoadSelect, OperatorSizes};
use crate::pipeline::{Index, Select};
use crate::{Error, KvConfig, Result};

/// What the kernels in the tree do not do for a method.
#[derive(Debug, Default)]
pub(super) struct Own {
    pub index: Option<Box<dyn GpuIndex>>,
    pub select: Option<Box<dyn GpuSelect>>,
}

impl Own {
    /// Refuses methods with operators that run on the CPU alone.
    pub fn check(config: &KvConfig, sizes: &OperatorSizes) -> Result<()> {
        own_index(config, sizes)?;
        own_select(config, sizes).map(|_| ())
    }

    /// Loads a method's own operators, if it has any.
    pub fn load(config: &KvConfig, sizes: &OperatorSizes, stream: &Stream) -> Result<Self> {
        let index = own_index(config, sizes)?.map(|load| load(stream)).transpose()?;
        let select = own_select(config, sizes)?.map(|load| load(stream)).transpose()?;
        Ok(Self { index, select })
    }

    /// Words of scratch of a row.
    pub fn scratch_words(&self) -> usize {
        self.select.as_ref().map_or(0, |select| select.scratch_words())
    }

    /// Bytes on the GPU.
    pub fn bytes(&self) -> u64 {
        let index = self.index.as_ref().map_or(0, |index| index.bytes());
        index + self.select.as_ref().map_or(0, |select| select.bytes())
    }
}

fn own_index<'a>(config: &'a KvConfig, sizes: &OperatorSizes) -> Result<Option<LoadIndex<'a>>> {
    match config.method().index() {
        Index::Custom(operator) => operator.on_gpu(sizes)?.map(Some).ok_or_else(|| refused(config, "Index")),
        _ => Ok(None),
    }
}

fn own_select<'a>(config: &'a KvConfig, sizes: &OperatorSizes) -> Result<Option<LoadSelect<'a>>> {
    match config.method().select() {
        Select::Custom { picker, .. } => {
            picker.on_gpu(sizes)?.map(Some).ok_or_else(|| refused(config, "Select"))
        }
        _ => Ok(None),
    }
}

fn refused(config: &KvConfig, stage: &str) -> Error {
    let what = format!("method {}: its own {stage} runs on the CPU alone", config.method().name());
    Error::UnsupportedOnGpu { what }
}
