#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| spinkv_fuzz::checkpoint(data));
