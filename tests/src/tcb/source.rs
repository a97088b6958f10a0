//! Reads a crate as the compiler does: from its root along its modules, without what its conditions leave out.

use super::conditions::{Conditions, string};
use anyhow::{Context, Result};
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use quote::ToTokens;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use syn::ext::IdentExt;
use syn::parse::{ParseStream, Parser};
use syn::visit::Visit;
use syn::visit_mut::{self, VisitMut};
use syn::{Attribute, Item, ItemMod, Meta, Token};

/// A source file, less what is not compiled and less its documentation.
pub(crate) struct SourceFile {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Its text, all of it.
    pub(crate) text: String,
    /// What is compiled of it.
    pub(crate) syntax: syn::File,
}

impl SourceFile {
    /// Parses a file's text.
    ///
    /// # Errors
    /// It isn't Rust.
    pub(crate) fn parse(path: &Path, text: String, conditions: &Conditions) -> Result<Self> {
        let mut syntax =
            syn::parse_file(&text).with_context(|| format!("cannot parse {}", path.display()))?;
        expand_cfg_if(&mut syntax.items, conditions);
        if !conditions.keep(&syntax.attrs) {
            syntax.items.clear();
        }
        Pruner { conditions }.visit_file_mut(&mut syntax);
        Ok(Self {
            path: path.to_owned(),
            text,
            syntax,
        })
    }

    /// How many lines hold code: no blank line, no comment, no documentation.
    pub(crate) fn code_lines(&self) -> usize {
        code_lines(self.syntax.to_token_stream())
    }

    /// The lines of each of its functions that hold code; a function within another is part of that.
    pub(crate) fn functions(&self) -> Vec<BTreeSet<usize>> {
        struct Finder(Vec<BTreeSet<usize>>);
        impl Finder {
            fn add(&mut self, function: &impl ToTokens) {
                let mut lines = BTreeSet::new();
                collect_lines(function.to_token_stream(), &mut lines);
                self.0.push(lines);
            }
        }
        impl<'ast> Visit<'ast> for Finder {
            fn visit_item_fn(&mut self, node: &'ast syn::ItemFn) {
                self.add(node);
            }
            fn visit_impl_item_fn(&mut self, node: &'ast syn::ImplItemFn) {
                self.add(node);
            }
        }
        let mut finder = Finder(Vec::new());
        finder.visit_file(&self.syntax);
        finder.0
    }
}

/// All files of the crate whose root is this file.
///
/// # Errors
/// A file cannot be read or parsed, or a module has none.
pub(crate) fn crate_files(root: &Path, conditions: &Conditions) -> Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    let folder = root.parent().context("a crate's root has a folder")?;
    let mut waiting = vec![(root.to_owned(), folder.to_owned())];
    while let Some((path, folder)) = waiting.pop() {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let file = SourceFile::parse(&path, text, conditions)?;
        find_modules(&file.syntax.items, &path, &folder, conditions, &mut waiting)?;
        files.push(file);
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// The files of the modules that these items declare, each with the folder of its own modules.
fn find_modules(
    items: &[Item],
    file: &Path,
    folder: &Path,
    conditions: &Conditions,
    found: &mut Vec<(PathBuf, PathBuf)>,
) -> Result<()> {
    for item in items {
        let Item::Mod(module) = item else { continue };
        let name = module.ident.unraw().to_string();
        match &module.content {
            Some((_, items)) => find_modules(items, file, &folder.join(name), conditions, found)?,
            None => found.push(module_file(module, file, folder, conditions)?),
        }
    }
    Ok(())
}

fn module_file(
    module: &ItemMod,
    file: &Path,
    folder: &Path,
    conditions: &Conditions,
) -> Result<(PathBuf, PathBuf)> {
    let name = module.ident.unraw().to_string();
    if let Some(path) = module.attrs.iter().find_map(|a| path_of(a, conditions)) {
        let path = file.with_file_name(path);
        let folder = path.parent().context("a module's file has a folder")?;
        return Ok((path.clone(), folder.to_owned()));
    }
    let inner = folder.join(&name);
    let (flat, nested) = (folder.join(format!("{name}.rs")), inner.join("mod.rs"));
    let path = if flat.exists() { flat } else { nested };
    Ok((path, inner))
}

/// The value of `#[path = "..."]`, also behind a `cfg_attr` that holds.
fn path_of(attribute: &Attribute, conditions: &Conditions) -> Option<String> {
    let from_meta = |meta: &Meta| match meta {
        Meta::NameValue(pair) if pair.path.is_ident("path") => string(&pair.value),
        _ => None,
    };
    if !attribute.path().is_ident("cfg_attr") {
        return from_meta(&attribute.meta);
    }
    let parse = syn::punctuated::Punctuated::<Meta, Token![,]>::parse_terminated;
    let parts = attribute.parse_args_with(parse).ok()?;
    let (predicate, rest) = (parts.first()?, parts.iter().skip(1));
    conditions
        .hold(predicate)
        .then(|| rest.into_iter().find_map(from_meta))?
}

/// Replaces each `cfg_if! { ... }` among the items by the branch that is compiled.
fn expand_cfg_if(items: &mut Vec<Item>, conditions: &Conditions) {
    let all = std::mem::take(items);
    for item in all {
        match &item {
            Item::Macro(m)
                if m.mac
                    .path
                    .segments
                    .last()
                    .is_some_and(|s| s.ident == "cfg_if") =>
            {
                let branch = chosen_branch(m.mac.tokens.clone(), conditions);
                items.extend(syn::parse2::<syn::File>(branch).map_or(Vec::new(), |f| f.items));
            }
            _ => items.push(item),
        }
    }
}

/// The body of the first branch of `if #[cfg(...)] { } else if #[cfg(...)] { } else { }` that holds.
fn chosen_branch(tokens: TokenStream, conditions: &Conditions) -> TokenStream {
    let mut taken = true;
    for token in tokens {
        let TokenTree::Group(group) = token else {
            continue;
        };
        if group.delimiter() == Delimiter::Bracket {
            taken = syn::parse2::<Meta>(group.stream()).is_ok_and(|meta| match meta {
                Meta::List(list) => list.parse_args().is_ok_and(|m| conditions.hold(&m)),
                _ => false,
            });
        } else if taken {
            return group.stream();
        } else {
            taken = true; // an `else` without a condition may follow
        }
    }
    TokenStream::new()
}

/// Takes out what is not compiled, and all documentation.
struct Pruner<'a> {
    conditions: &'a Conditions,
}

impl Pruner<'_> {
    fn prune<T: ToTokens>(&self, nodes: &mut Vec<T>) {
        nodes.retain(|node| self.conditions.keep(&outer_attributes(node)));
    }
}

impl VisitMut for Pruner<'_> {
    fn visit_file_mut(&mut self, node: &mut syn::File) {
        self.prune(&mut node.items);
        visit_mut::visit_file_mut(self, node);
    }
    fn visit_item_mod_mut(&mut self, node: &mut ItemMod) {
        if let Some((_, items)) = &mut node.content {
            self.prune(items);
        }
        visit_mut::visit_item_mod_mut(self, node);
    }
    fn visit_item_impl_mut(&mut self, node: &mut syn::ItemImpl) {
        self.prune(&mut node.items);
        visit_mut::visit_item_impl_mut(self, node);
    }
    fn visit_item_trait_mut(&mut self, node: &mut syn::ItemTrait) {
        self.prune(&mut node.items);
        visit_mut::visit_item_trait_mut(self, node);
    }
    fn visit_block_mut(&mut self, node: &mut syn::Block) {
        self.prune(&mut node.stmts);
        visit_mut::visit_block_mut(self, node);
    }
    fn visit_expr_match_mut(&mut self, node: &mut syn::ExprMatch) {
        self.prune(&mut node.arms);
        visit_mut::visit_expr_match_mut(self, node);
    }
    fn visit_attributes_mut(&mut self, attributes: &mut Vec<Attribute>) {
        attributes.retain(|attribute| !attribute.path().is_ident("doc"));
    }
}

fn outer_attributes(node: &impl ToTokens) -> Vec<Attribute> {
    let parser = |input: ParseStream<'_>| {
        let attributes = Attribute::parse_outer(input)?;
        input.parse::<TokenStream>()?;
        Ok(attributes)
    };
    parser.parse2(node.to_token_stream()).unwrap_or_default()
}

/// How many lines hold code among these tokens, which are of one file.
pub(crate) fn code_lines(tokens: TokenStream) -> usize {
    let mut lines = BTreeSet::new();
    collect_lines(tokens, &mut lines);
    lines.len()
}

/// The lines that the tokens stand on. Documentation inside a macro is still there, as attributes.
fn collect_lines(tokens: TokenStream, lines: &mut BTreeSet<usize>) {
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match &token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                if tokens.next_if(is_documentation).is_none() {
                    lines.insert(punct.span().start().line);
                }
            }
            TokenTree::Group(group) => {
                lines.insert(group.span_open().start().line);
                lines.insert(group.span_close().start().line);
                collect_lines(group.stream(), lines);
            }
            _ => lines.extend(token.span().start().line..=token.span().end().line),
        }
    }
}

fn is_documentation(token: &TokenTree) -> bool {
    let TokenTree::Group(group) = token else {
        return false;
    };
    let first = group.stream().into_iter().next();
    group.delimiter() == Delimiter::Bracket
        && matches!(first, Some(TokenTree::Ident(name)) if name == "doc")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str) -> usize {
        let conditions = Conditions::new(["target_os=\"none\""]);
        SourceFile::parse(Path::new("x.rs"), text.into(), &conditions)
            .unwrap()
            .code_lines()
    }

    #[test]
    fn comments_documentation_and_blank_lines_do_not_count() {
        let text = "//! Crate.\n\n/// Function.\nfn f() { // trailing\n    /* block\n    */\n    g();\n}\n";
        assert_eq!(count(text), 3);
    }

    #[test]
    fn tests_do_not_count_at_any_depth() {
        assert_eq!(
            count("fn f() {}\n#[cfg(test)]\nmod tests {\n fn t() {}\n}\n"),
            1
        );
        assert_eq!(count("impl A {\n #[cfg(test)]\n fn t() {}\n}\n"), 2);
        assert_eq!(count("fn f() {\n #[cfg(test)]\n g();\n}\n"), 2);
        assert_eq!(count("#![cfg(test)]\nfn f() {}\n"), 1);
    }

    #[test]
    fn functions_are_found_with_their_lines() {
        let text =
            "struct S;\nfn f() {\n    // why\n    fn g() {}\n}\nimpl S {\n    fn h() {}\n}\n";
        let conditions = Conditions::new(["target_os=\"none\""]);
        let file = SourceFile::parse(Path::new("x.rs"), text.into(), &conditions).unwrap();
        assert_eq!(
            file.functions(),
            [BTreeSet::from([2, 4, 5]), BTreeSet::from([7])]
        );
    }

    #[test]
    fn documentation_inside_a_macro_does_not_count() {
        assert_eq!(count("m! {\n    /// Words.\n    name\n}\n"), 3);
    }

    #[test]
    fn strings_count_all_their_lines() {
        assert_eq!(count("const S: &str = \"a\n\nb\";\n"), 3);
    }

    #[test]
    fn cfg_if_counts_the_branch_taken() {
        let text = "cfg_if::cfg_if! {\nif #[cfg(test)] {\nfn a() {}\n} else if #[cfg(target_os = \"none\")] \
                    {\nfn b() {\n}\n} else {\nfn c() {}\n}\n}\n";
        assert_eq!(count(text), 2);
    }
}
