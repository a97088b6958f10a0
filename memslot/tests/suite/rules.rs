//! The list of rules in `docs/memslot-rules.md` names tests that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Names of the functions in all files below a folder.
fn functions(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, names);
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let after_fn = text.split("fn ").skip(1);
        names.extend(after_fn.filter_map(|t| Some(t.split_once('(')?.0.to_owned())));
    }
}

#[test]
fn every_rule_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names = BTreeSet::new();
    functions(&root.join("src"), &mut names);
    functions(&root.join("tests"), &mut names);
    let rules = fs::read_to_string(root.join("../docs/memslot-rules.md")).unwrap();
    let rows = rules.lines().filter(|line| line.starts_with("| "));
    let tests: Vec<&str> = rows
        .filter_map(|row| row.split('|').nth(2))
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    assert!(tests.len() > 150, "only {} tests are named", tests.len());
    let missing: Vec<_> = tests.iter().filter(|t| !names.contains(**t)).collect();
    assert!(missing.is_empty(), "no such tests: {missing:?}");
}
