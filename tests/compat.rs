//! docs/compat.md and the tests that it names: every MUST has its row, every
//! row a test that is there and not ignored, and every mutation of
//! tests/mutations.txt still applies. Whether the tests ran is what
//! scripts/check-compat.sh sees, and whether they can fail, scripts/mutate.sh.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, which fail that way"
)]

#[path = "compat/mutations.rs"]
mod mutations;
#[path = "compat/rows.rs"]
mod rows;
#[path = "compat/sources.rs"]
mod sources;

use std::collections::{BTreeMap, BTreeSet};

use mutations::Mutation;
use rows::{Row, UNTESTED};
use sources::read;

/// Every kind of row, and how many there are.
const IDS: [(char, usize); 3] = [('M', 32), ('E', 31), ('P', 43)];

fn expected() -> BTreeSet<String> {
    let ids = IDS
        .iter()
        .flat_map(|(kind, count)| (1..=*count).map(move |n| format!("{kind}{n}")));
    ids.collect()
}

/// What is wrong with the rows, given the tests that there are, each with
/// whether it is ignored.
fn faults(rows: &[Row], tests: &BTreeMap<String, bool>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut missing = expected();
    for row in rows {
        let id = &row.id;
        if !missing.remove(id) {
            faults.push(format!("{id}: there twice, or no MUST"));
        }
        if row.what.is_empty() {
            faults.push(format!("{id}: does not say what must hold"));
        }
        for place in &row.places {
            if !sources::root().join(place).exists() {
                faults.push(format!("{id}: no such place: {place}"));
            }
        }
        let untested = UNTESTED.contains(&id.as_str());
        if untested != row.tests.is_empty() || untested != row.places.is_empty() {
            faults.push(format!(
                "{id}: {} tests, {} places",
                row.tests.len(),
                row.places.len()
            ));
        }
        for test in &row.tests {
            match tests.get(test) {
                None => faults.push(format!("{id}: no such test: {test}")),
                Some(true) => faults.push(format!("{id}: {test} is ignored")),
                Some(false) => {}
            }
        }
    }
    faults.extend(missing.into_iter().map(|id| format!("{id}: no row")));
    faults
}

#[test]
fn every_must_has_a_row_with_a_test() {
    let rows = rows::parse(&read("docs/compat.md"));
    assert_eq!(faults(&rows, &sources::tests()), Vec::<String>::new());
}

#[test]
fn every_mutation_applies() {
    let mutations = mutations::parse(&read("tests/mutations.txt"));
    let mut faults: Vec<String> = mutations.iter().filter_map(Mutation::fault).collect();
    let rows = rows::parse(&read("docs/compat.md"));
    let mut seen = BTreeSet::new();
    for Mutation { id, nth, .. } in &mutations {
        if !seen.insert((id, *nth)) {
            faults.push(format!("{id}: two mutations for test {nth}"));
        }
        if !rows
            .iter()
            .any(|row| row.id == *id && (1..=row.tests.len()).contains(nth))
        {
            faults.push(format!("{id}: no row with a test {nth}"));
        }
    }
    let without = rows
        .iter()
        .filter(|row| !row.tests.is_empty() && !seen.contains(&(&row.id, 1)));
    faults.extend(without.map(|row| format!("{}: no mutation", row.id)));
    assert_eq!(faults, Vec::<String>::new());
}

/// Each kind of fault is seen.
#[test]
fn the_checks_see_what_they_shall() {
    let table = "\
        | id | what must hold | where | test |\n|---|---|---|---|\n\
        | M1 | a | `src/lib.rs` | `lib::a::good` |\n\
        | M1 | twice | `src/lib.rs` | `lib::a::good` |\n\
        | M2 | b | `src/nowhere.rs` | `lib::a::good` |\n\
        | M3 | c | `src/lib.rs` | `lib::a::gone` |\n\
        | M4 | d | `src/lib.rs` | `lib::a::good`, `lib::a::asleep` |\n\
        | M5 | e | `src/lib.rs` | – |\n\
        | P42 | f | `src/lib.rs` | `lib::a::good` |\n\
        | P44 |  | `src/lib.rs` | `lib::a::good` |\n";
    let rows = rows::parse(table);
    assert_eq!(rows.len(), 8);
    let tests = [("lib::a::good", false), ("lib::a::asleep", true)];
    let tests = tests
        .map(|(name, ignored)| (name.to_owned(), ignored))
        .into();
    let faults = faults(&rows, &tests);
    for expected in [
        "M1: there twice",
        "M2: no such place: src/nowhere.rs",
        "M3: no such test: lib::a::gone",
        "M4: lib::a::asleep is ignored",
        "M5: 0 tests",
        "P42: 1 tests",
        "P44: there twice, or no MUST",
        "P44: does not say",
        "M6: no row",
        "E31: no row",
    ] {
        assert!(
            faults.iter().any(|fault| fault.starts_with(expected)),
            "{expected}: {faults:#?}"
        );
    }
    let good = "\
        [M1] src/core/readiness.rs\n- !self.stopping && (self.endpoint\n+ (self.endpoint\n";
    let stale = "[M1] src/core\n- nothing like this\n+ x\n";
    let vague = "[M1] src/core\n- use \n+ x\n";
    let same = "[M1] src/core/readiness.rs\n- !self.stopping && (self\n+ !self.stopping && (self\n";
    for (text, is_good) in [(good, true), (stale, false), (vague, false), (same, false)] {
        let [mutation] = mutations::parse(text).try_into().unwrap();
        assert_eq!(mutation.fault().is_none(), is_good, "{text}");
    }
}

/// The reading of sources is right about tests in files, in inline modules,
/// below macros and behind attributes.
#[test]
fn tests_are_found_where_the_compiler_finds_them() {
    let tests = sources::tests();
    for name in [
        "lib::core::readiness::tests::names",
        "lib::core::lb_session::tests::stopping::stopping_in_each_state_closes_what_is_connected_once",
        "lib::core::lb_session::walk::a_session_keeps_its_word",
        "lib::nsm::convert::tests::one_family_alone",
        "contract_transport::hostile::plaintext_is_refused",
        "kernel_netns::worker::adoption::a_predecessor_s_state_carries_traffic_until_told_otherwise",
        "compat::tests_are_found_where_the_compiler_finds_them",
    ] {
        assert_eq!(tests.get(name), Some(&false), "{name}");
    }
    let (found, ignored) = sources::in_text(
        "#[test]\nfn a() {}\n#[test]\n#[ignore = \"x\"]\n#[expect(y)]\nfn b() {}\nfn c() {}\n\
         mod d {\n    #[test]\n    fn e() {}\n}\n#[test]\nfn f() {}\n",
    );
    assert_eq!(found, ["a", "b", "d::e", "f"]);
    assert_eq!(ignored, ["b"]);
}
