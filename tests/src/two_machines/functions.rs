//! Functions of a source file, and their lines of code.

use crate::files;
use crate::tcb::{Conditions, SourceFile, code_lines};
use anyhow::{Result, ensure};
use quote::ToTokens;
use std::collections::BTreeMap;
use syn::visit::{self, Visit};

/// What both machines are compiled with.
const CONDITIONS: [&str; 2] = ["target_os=\"none\"", "feature=\"x86\""];

/// The files that were asked for so far.
#[derive(Default)]
pub(super) struct Sources(BTreeMap<String, Vec<Found>>);

/// A function: its type's name, if it has one, its own, and its lines.
struct Found {
    of: Option<String>,
    name: String,
    lines: usize,
}

impl Sources {
    /// Lines of the function `name`, or `Type::name`, of a file below the root.
    ///
    /// # Errors
    /// The file cannot be read, or has no such function, or more than one.
    pub(super) fn lines(&mut self, file: &str, name: &str) -> Result<usize> {
        if !self.0.contains_key(file) {
            let path = files::root().join(file);
            let text = String::from_utf8(files::read(&path, "the page names it")?)?;
            let source = SourceFile::parse(&path, text, &Conditions::new(CONDITIONS))?;
            self.0.insert(file.to_owned(), functions(&source.syntax));
        }
        let all = self.0.get(file).map(Vec::as_slice).unwrap_or_default();
        one(all, file, name)
    }
}

fn one(all: &[Found], file: &str, name: &str) -> Result<usize> {
    let (of, own) = match name.split_once("::") {
        Some((of, own)) => (Some(of), own),
        None => (None, name),
    };
    let fits = |f: &&Found| f.name == own && (of.is_none() || f.of.as_deref() == of);
    let found: Vec<_> = all.iter().filter(fits).collect();
    ensure!(
        found.len() == 1,
        "{file} has {} functions '{name}', not one",
        found.len()
    );
    Ok(found.iter().map(|f| f.lines).sum())
}

/// All functions with a body; those of a trait by the trait's name.
fn functions(file: &syn::File) -> Vec<Found> {
    let mut collector = Collector::default();
    collector.visit_file(file);
    collector.found
}

#[derive(Default)]
struct Collector {
    of: Option<String>,
    found: Vec<Found>,
}

impl Collector {
    fn add(&mut self, name: &syn::Ident, node: &impl ToTokens) {
        self.found.push(Found {
            of: self.of.clone(),
            name: name.to_string(),
            lines: code_lines(node.to_token_stream()),
        });
    }

    fn within(&mut self, of: Option<String>, visit: impl FnOnce(&mut Self)) {
        let before = std::mem::replace(&mut self.of, of);
        visit(self);
        self.of = before;
    }
}

impl<'ast> Visit<'ast> for Collector {
    fn visit_item_impl(&mut self, node: &'ast syn::ItemImpl) {
        let of = match &*node.self_ty {
            syn::Type::Path(path) => path.path.segments.last().map(|s| s.ident.to_string()),
            _ => None,
        };
        self.within(of, |this| visit::visit_item_impl(this, node));
    }

    fn visit_item_trait(&mut self, node: &'ast syn::ItemTrait) {
        let of = Some(node.ident.to_string());
        self.within(of, |this| visit::visit_item_trait(this, node));
    }

    fn visit_item_fn(&mut self, node: &'ast syn::ItemFn) {
        self.add(&node.sig.ident, node);
    }

    fn visit_impl_item_fn(&mut self, node: &'ast syn::ImplItemFn) {
        self.add(&node.sig.ident, node);
    }

    fn visit_trait_item_fn(&mut self, node: &'ast syn::TraitItemFn) {
        if node.default.is_some() {
            self.add(&node.sig.ident, node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_found_by_name_or_by_type_and_name() {
        let text = "fn f() {}\nimpl A {\n/// Words.\nfn g(&self) {\n\n// why\nf();\n}\n}\nimpl T for B<u8> {\nfn g(&self) {}\n}\n\
                    trait T {\nfn g(&self);\nfn h(&self) {}\n}\n";
        let all = functions(&syn::parse_file(text).unwrap());
        let lines = |name: &str| one(&all, "x.rs", name).ok();
        assert_eq!(
            (lines("f"), lines("A::g"), lines("B::g")),
            (Some(1), Some(3), Some(1))
        );
        assert_eq!((lines("T::h"), lines("T::g")), (Some(1), None));
        let error = one(&all, "x.rs", "g").unwrap_err().to_string();
        assert_eq!(error, "x.rs has 2 functions 'g', not one");
    }
}
