use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{Drift, Kernels};
use spinkv_kernels::abi::Entry;

use crate::driver;

#[test]
fn a_drift_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let entries = DeviceBuffer::from_slice(&stream, &[Entry::default(); 3]).unwrap();
    let none = entries.part(0..0).unwrap();
    let numbers = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let (ids, selected, short) = (numbers(60), numbers(6), numbers(5));
    let right = Drift {
        entries: &entries,
        first_row: 14,
        kv_heads: 2,
        pace: 7,
        capacity: 10,
        ids: &ids,
        selected: &selected,
    };
    driver.log();
    // SAFETY: the stand-in runs nothing.
    let launch = |launch: Drift<'_>| unsafe { launch.launch(&kernels, &stream) };
    let operand = |what, value, max| Err(DriverError::Operand { what, value, min: 1, max });
    let most = u64::from(u32::MAX);
    assert_eq!(launch(Drift { kv_heads: 0, ..right }), operand("drift kv_heads", 0, most));
    assert_eq!(launch(Drift { capacity: 0, ..right }), operand("drift capacity", 0, most));
    let beyond = operand("drift first_row + kv_heads", most + 2, most);
    assert_eq!(launch(Drift { first_row: u32::MAX, ..right }), beyond);
    let length = |what, expected, found| Err(DriverError::Length { what, expected, found });
    assert_eq!(launch(Drift { selected: &short, ..right }), length("drift selected", 6, 5));
    assert_eq!(launch(Drift { capacity: 9, ..right }), length("drift ids", 54, 60));
    let (no_ids, no_counts) = (ids.part(0..0).unwrap(), selected.part(0..0).unwrap());
    launch(Drift { entries: &none, ids: &no_ids, selected: &no_counts, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    launch(right).unwrap();
    let [entries, ids, selected] = [entries.address(), ids.address(), selected.address()];
    let expected = format!("launch drift 6 1 1, 128 1 1, 0: {entries:#x} 14 2 7 10 {ids:#x} {selected:#x}");
    assert_eq!(driver.log(), [expected]);
}
