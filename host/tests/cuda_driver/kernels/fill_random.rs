use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{FillRandom, Kernels};

use crate::driver;

#[test]
fn a_fill_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (few, many, none) = (words(257), words(40_000), words(0));
    let right = FillRandom { out: &few, seed: 7 << 32 | 9, deviation: 37837.0 };
    driver.log();
    for deviation in [0.0, -1.0, f32::INFINITY, f32::NAN] {
        let value = deviation.to_string();
        let refused = DriverError::Positive { what: "fill_random deviation", value };
        assert_eq!(FillRandom { deviation, ..right }.launch(&kernels, &stream), Err(refused));
    }
    FillRandom { out: &none, ..right }.launch(&kernels, &stream).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    right.launch(&kernels, &stream).unwrap();
    let address = few.address();
    assert_eq!(driver.log(), [format!("launch fill_random 2 1 1, 256 1 1, 0: {address:#x} 257 9 7 1.00")]);
    FillRandom { out: &many, deviation: 2.0 * 37837.0, ..right }.launch(&kernels, &stream).unwrap();
    let address = many.address();
    let expected = format!("launch fill_random 157 1 1, 256 1 1, 0: {address:#x} 40000 9 7 2.00");
    assert_eq!(driver.log(), [expected]);
}
