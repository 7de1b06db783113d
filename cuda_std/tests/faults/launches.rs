//! Launches outside of the hardware's limits.

use cuda_std::emulator::{FaultKind, Index, Launch, LaunchError};

#[test]
fn launches_outside_of_the_hardwares_limits_are_refused() {
    let nothing = || ();
    let refused = |launch: Launch| {
        let fault = launch.run(nothing).unwrap_err();
        assert!(fault.location.file().ends_with("launches.rs"), "{fault}");
        match fault.kind {
            FaultKind::Launch(error) => error,
            _ => panic!("{fault}"),
        }
    };
    let one = Launch::default();
    assert!(matches!(refused(Launch { grid: (1, 0, 1), ..one }), LaunchError::Empty { .. }));
    assert!(matches!(refused(Launch { block: (0, 1, 1), ..one }), LaunchError::Empty { .. }));
    for block in [(1025, 1, 1), (1, 1, 65), (32, 33, 1), (u32::MAX, u32::MAX, u32::MAX)] {
        let error = refused(Launch { block, ..one });
        assert_eq!(error, LaunchError::BlockTooLarge { block: Index::from(block) });
    }
    for grid in [(1 << 31, 1, 1), (1, 1 << 16, 1), (1, 1, 1 << 16), (65_536, 65_535, 2)] {
        let error = refused(Launch { grid, ..one });
        assert_eq!(error, LaunchError::GridTooLarge { grid: Index::from(grid) });
    }
    let (bytes, limit) = (227 * 1024 + 1, 227 * 1024);
    let error = refused(one.shared(bytes));
    assert_eq!(error, LaunchError::SharedTooLarge { bytes, limit });
    assert_eq!(error.to_string(), "232449 bytes of shared memory exceed the 232448 that a block can have");
    let (least, most) = (16 << 10, 1 << 30);
    for stack_bytes in [0, 1, least - 1] {
        let error = refused(Launch { stack_bytes, ..one });
        assert_eq!(error, LaunchError::StackTooSmall { bytes: stack_bytes, limit: least });
    }
    for stack_bytes in [most + 1, usize::MAX - 4095, usize::MAX] {
        let error = refused(Launch { stack_bytes, ..one });
        assert_eq!(error, LaunchError::StackTooLarge { bytes: stack_bytes, limit: most });
    }
    let error = refused(Launch { stack_bytes: 4096, ..one });
    assert_eq!(error.to_string(), "stacks of 4096 bytes are too small: a thread needs at least 16384");
    for block in [(1024, 1, 1), (4, 4, 64), (32, 32, 1)] {
        assert_eq!(Launch { block, ..one }.shared(limit).run(nothing).unwrap().threads, 1024);
    }

    let nested = std::cell::Cell::new(None);
    one.run(|| nested.set(one.run(nothing).err())).unwrap();
    let nested = nested.take().unwrap();
    assert_eq!(nested.kind, FaultKind::Launch(LaunchError::Nested));
}
