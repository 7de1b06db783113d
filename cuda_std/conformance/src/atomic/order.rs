//! Fences, and what orders of atomics are for: handing over what was written with plain stores.

/// Each thread of a group writes a word and counts itself in; who comes last adds up all words.
macro_rules! last_adds_up {
    ($io:ident, $scope:ident, $order:ident, $between:expr) => {
        // The block where the scope is the block, else the grid.
        let (first, threads) = match Scope::$scope {
            Scope::Block => ($io.first_of_block(), block_dim_x()),
            _ => (0, grid_dim_x() * block_dim_x()),
        };
        $io.put($io.given().load(0));
        let cells = $io.results_of(first);
        $between;
        let before = cells.atomic_add(1, 1, Order::$order, Scope::$scope);
        if before == threads - 1 {
            $between;
            let (mut sum, mut thread) = (0u32, 0u32);
            while thread < threads {
                sum = sum.wrapping_mul(3).wrapping_add($io.results_of(first + thread as usize).load(0));
                thread += 1;
            }
            cells.store(2, sum);
        }
    };
}

macro_rules! orders {
    (
        fences { $($fence:ident: $strength:ident $scope:ident = $ptx:literal;)* }
        handing_over { $($over:ident: $over_scope:ident = $over_ptx:literal;)* }
    ) => {
        conform! { CASES:
            $(
                $fence(
                    covers = ["atomic::fence", concat!("atomic::Fence::", stringify!($strength)),
                        concat!("atomic::Scope::", stringify!($scope))],
                    expects = [$ptx], in = [u32; 1], out = [u32; 3],
                ) |io| {
                    last_adds_up!(io, $scope, Relaxed, fence(Fence::$strength, Scope::$scope));
                }
            )*
            $(
                $over(
                    covers = ["atomic::GlobalMut<u32>::atomic_add", "atomic::Order::AcqRel"],
                    expects = [$over_ptx], in = [u32; 1], out = [u32; 3],
                ) |io| {
                    last_adds_up!(io, $over_scope, AcqRel, ());
                }
            )*
        }
    };
}

orders! {
    fences {
        fence_acq_rel_block: AcqRel Block = "fence.acq_rel.cta";
        fence_acq_rel_device: AcqRel Device = "fence.acq_rel.gpu";
        fence_acq_rel_system: AcqRel System = "fence.acq_rel.sys";
        fence_seq_cst_block: SeqCst Block = "fence.sc.cta";
        fence_seq_cst_device: SeqCst Device = "fence.sc.gpu";
        fence_seq_cst_system: SeqCst System = "fence.sc.sys";
    }
    handing_over {
        hand_over_in_block: Block = "atom.acq_rel.cta.global.add.u32";
        hand_over_in_device: Device = "atom.acq_rel.gpu.global.add.u32";
        hand_over_in_system: System = "atom.acq_rel.sys.global.add.u32";
    }
}
