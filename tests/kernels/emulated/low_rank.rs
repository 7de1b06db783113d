use spinkv_kernel_tests::low_rank::{
    BasisCase, CompleteCase, FactorCase, GramCase, ProductCase, ProjectCase, RebuildCase, UnrotateCase,
};

use super::SHAPES;

/// Of what is found in many launches, or takes its time.
const LONG_SHAPES: u64 = 12;
/// Orders of one shape.
const ORDERS: u64 = 20;

#[test]
fn unrotate_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = UnrotateCase::random(seed);
        let plain = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&plain).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn gram_on_random_shapes() {
    let cases = (0..2 * LONG_SHAPES).map(|seed| (seed, GramCase::random(seed)));
    for (seed, case) in cases.chain((0..4).map(|seed| (seed, GramCase::long(seed)))) {
        let gram = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&gram).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn row_products_on_random_shapes() {
    for seed in 0..SHAPES / 2 {
        let case = ProductCase::random(seed);
        let out = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&out).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn inverse_factor_on_random_vectors() {
    for seed in 0..SHAPES {
        let case = FactorCase::random(seed);
        let factor = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&factor).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}\n{case:?}"));
    }
}

#[test]
fn products_and_factors_in_random_orders() {
    let (product, factor) = (ProductCase::random(1), FactorCase::large(2, 40));
    // In bits: sums are in one order.
    let first = (product.emulate(0).unwrap(), factor.emulate(0).unwrap());
    for schedule in 1..ORDERS {
        let again = (product.emulate(schedule).unwrap(), factor.emulate(schedule).unwrap());
        assert_eq!(again, first, "schedule {schedule}");
    }
}

#[test]
fn complete_basis_on_random_rows() {
    for seed in 0..SHAPES {
        let case = CompleteCase::random(seed);
        let vectors = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&vectors).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn complete_basis_looks_at_all_axes_of_a_thread() {
    let case = CompleteCase::wide();
    let vectors = case.emulate(0).unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(vectors[2085..].iter().position(|element| *element != 0.0), Some(1500));
    case.check(&vectors).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn complete_basis_of_a_layer() {
    for seed in 0..3 {
        let case = CompleteCase::large(seed);
        let vectors = case.emulate(seed).unwrap_or_else(|fault| panic!("{fault}"));
        case.check(&vectors).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn complete_basis_stays_within_rows_that_are_no_numbers() {
    let vectors = CompleteCase::not_finite().emulate(0).unwrap_or_else(|fault| panic!("{fault}"));
    assert!(vectors[..5].iter().all(|element| element.is_nan()), "{vectors:?}");
}

#[test]
fn project_keys_on_random_entries() {
    for seed in 0..SHAPES {
        let case = ProjectCase::random(seed);
        let found = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&found).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn completions_and_projections_in_random_orders() {
    let (complete, project) = (CompleteCase::random(SHAPES + 1), ProjectCase::random(SHAPES + 1));
    // In bits: sums are in one order.
    let first = (complete.emulate(0).unwrap(), project.emulate(0).unwrap());
    for schedule in 1..ORDERS {
        let again = (complete.emulate(schedule).unwrap(), project.emulate(schedule).unwrap());
        assert!(again == first, "schedule {schedule}");
    }
}

#[test]
fn a_basis_is_as_good_as_the_cpus() {
    for seed in 0..LONG_SHAPES {
        let case = BasisCase::random(seed);
        let basis = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&basis).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn rebuild_keys_on_random_lists() {
    for seed in 0..SHAPES {
        let case = RebuildCase::random(seed);
        let pool = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        case.check(&pool).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn rebuild_keys_in_random_orders() {
    let case = RebuildCase::random(SHAPES + 3);
    let first = case.emulate(0).unwrap();
    for schedule in 1..ORDERS {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}
