//! Finds each `unsafe` and the comment that stands for it.

use super::source::SourceFile;
use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};
use std::fmt;
use syn::visit::{self, Visit};
use syn::{Attribute, Safety, Signature};

/// What is unsafe.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// `unsafe { }`
    Block,
    /// `unsafe fn`
    Function,
    /// `unsafe impl`
    Impl,
    /// `unsafe trait`
    Trait,
    /// `unsafe extern`
    Extern,
    /// `#[unsafe(...)]`
    Attribute,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "block",
            Self::Function => "fn",
            Self::Impl => "impl",
            Self::Trait => "trait",
            Self::Extern => "extern",
            Self::Attribute => "attribute",
        })
    }
}

/// One use of `unsafe`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Use {
    /// Line, from 1.
    pub(crate) line: usize,
    /// What it is.
    pub(crate) kind: Kind,
    /// The function, type or macro that it is in.
    pub(crate) within: String,
    /// First sentence of its SAFETY comment, or of its `# Safety` section; `None` if it has none.
    pub(crate) reason: Option<String>,
}

impl Use {
    /// Whether a comment must stand for it. Attributes name symbols and sections, declarations of
    /// foreign functions say `unsafe` for their callers: each call is a block of its own.
    pub(crate) fn needs_reason(&self) -> bool {
        !matches!(self.kind, Kind::Attribute | Kind::Extern)
    }
}

/// All of a file, in order.
pub(crate) fn uses(file: &SourceFile) -> Vec<Use> {
    let mut finder = Finder {
        lines: file.text.lines().collect(),
        names: Vec::new(),
        statement: 1,
        contract: None,
        found: Vec::new(),
    };
    finder.visit_file(&file.syntax);
    finder.found.sort_by_key(|one| one.line);
    finder.found
}

struct Finder<'a> {
    lines: Vec<&'a str>,
    /// What encloses the node, outermost first.
    names: Vec<String>,
    /// First line of the innermost statement or item, where a comment may stand, too.
    statement: usize,
    /// The trait that is being implemented, which says what callers of its functions owe.
    contract: Option<String>,
    found: Vec<Use>,
}

impl Finder<'_> {
    fn record(&mut self, kind: Kind, span: Span) {
        let line = span.start().line;
        let reason = if kind == Kind::Function || kind == Kind::Trait {
            safety_section(&self.lines, self.statement.min(line))
        } else {
            safety_comment(&self.lines, line)
                .or_else(|| safety_comment(&self.lines, self.statement))
        };
        self.found.push(Use {
            line,
            kind,
            within: self.names.join("::"),
            reason,
        });
    }

    fn inside(&mut self, name: String, visit: impl FnOnce(&mut Self)) {
        self.names.push(name);
        visit(self);
        self.names.pop();
    }

    fn at(&mut self, statement: Span, visit: impl FnOnce(&mut Self)) {
        let outer = std::mem::replace(&mut self.statement, statement.start().line);
        visit(self);
        self.statement = outer;
    }

    fn signature(&mut self, signature: &Signature) {
        if let Safety::Unsafe(token) = &signature.safety {
            self.record(Kind::Function, token.span);
            let contract = self
                .contract
                .as_ref()
                .map(|name| format!("as `{name}` says"));
            if let Some(one) = self.found.last_mut() {
                one.reason = one.reason.take().or(contract);
            }
        }
    }

    /// A macro's body is no syntax tree: its tokens are searched.
    fn search(&mut self, tokens: TokenStream) {
        let mut tokens = tokens.into_iter().peekable();
        while let Some(token) = tokens.next() {
            match (&token, tokens.peek()) {
                (TokenTree::Ident(word), Some(next)) if word == "unsafe" => {
                    if let Some(kind) = kind_before(next) {
                        self.record(kind, word.span());
                    }
                }
                (TokenTree::Group(group), _) => self.search(group.stream()),
                _ => {}
            }
        }
    }
}

/// What `unsafe` in front of this token is.
fn kind_before(token: &TokenTree) -> Option<Kind> {
    match token {
        TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => Some(Kind::Block),
        TokenTree::Group(group) if group.delimiter() == Delimiter::Parenthesis => {
            Some(Kind::Attribute)
        }
        TokenTree::Ident(word) if word == "fn" => Some(Kind::Function),
        TokenTree::Ident(word) if word == "impl" => Some(Kind::Impl),
        TokenTree::Ident(word) if word == "trait" => Some(Kind::Trait),
        TokenTree::Ident(word) if word == "extern" => Some(Kind::Extern),
        _ => None,
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item(&mut self, node: &'ast syn::Item) {
        self.at(syn::spanned::Spanned::span(node), |this| {
            visit::visit_item(this, node);
        });
    }
    fn visit_impl_item(&mut self, node: &'ast syn::ImplItem) {
        self.at(syn::spanned::Spanned::span(node), |this| {
            visit::visit_impl_item(this, node);
        });
    }
    fn visit_trait_item(&mut self, node: &'ast syn::TraitItem) {
        self.at(syn::spanned::Spanned::span(node), |this| {
            visit::visit_trait_item(this, node);
        });
    }
    fn visit_stmt(&mut self, node: &'ast syn::Stmt) {
        self.at(syn::spanned::Spanned::span(node), |this| {
            visit::visit_stmt(this, node);
        });
    }
    fn visit_item_fn(&mut self, node: &'ast syn::ItemFn) {
        self.inside(node.sig.ident.to_string(), |this| {
            this.signature(&node.sig);
            visit::visit_item_fn(this, node);
        });
    }
    fn visit_impl_item_fn(&mut self, node: &'ast syn::ImplItemFn) {
        self.inside(node.sig.ident.to_string(), |this| {
            this.signature(&node.sig);
            visit::visit_impl_item_fn(this, node);
        });
    }
    fn visit_trait_item_fn(&mut self, node: &'ast syn::TraitItemFn) {
        self.inside(node.sig.ident.to_string(), |this| {
            this.signature(&node.sig);
            visit::visit_trait_item_fn(this, node);
        });
    }
    fn visit_item_impl(&mut self, node: &'ast syn::ItemImpl) {
        self.inside(type_name(&node.self_ty), |this| {
            if let Some(token) = node.unsafety {
                this.record(Kind::Impl, token.span);
            }
            let name = node
                .trait_
                .as_ref()
                .and_then(|(path, _)| path.segments.last());
            this.contract = name.map(|segment| segment.ident.to_string());
            visit::visit_item_impl(this, node);
            this.contract = None;
        });
    }
    fn visit_item_trait(&mut self, node: &'ast syn::ItemTrait) {
        self.inside(node.ident.to_string(), |this| {
            if let Some(token) = node.unsafety {
                this.record(Kind::Trait, token.span);
            }
            visit::visit_item_trait(this, node);
        });
    }
    fn visit_item_foreign_mod(&mut self, node: &'ast syn::ItemForeignMod) {
        if let Some(token) = node.unsafety {
            self.record(Kind::Extern, token.span);
        }
    }
    fn visit_item_macro(&mut self, node: &'ast syn::ItemMacro) {
        let name = node.ident.as_ref().map(|name| format!("{name}!"));
        self.inside(name.unwrap_or_default(), |this| {
            visit::visit_item_macro(this, node);
        });
    }
    fn visit_expr_unsafe(&mut self, node: &'ast syn::ExprUnsafe) {
        self.record(Kind::Block, node.unsafe_token.span);
        visit::visit_expr_unsafe(self, node);
    }
    fn visit_attribute(&mut self, node: &'ast Attribute) {
        if node.path().is_ident("unsafe") {
            self.record(
                Kind::Attribute,
                syn::spanned::Spanned::span(&node.path().get_ident()),
            );
        }
    }
    fn visit_macro(&mut self, node: &'ast syn::Macro) {
        self.search(node.tokens.clone());
    }
}

/// A type's name without its parameters.
fn type_name(node: &syn::Type) -> String {
    match node {
        syn::Type::Path(path) => path
            .path
            .segments
            .last()
            .map_or_else(String::new, |segment| segment.ident.to_string()),
        _ => "_".into(),
    }
}

/// The comment above a line, from `SAFETY:` on, its first sentence.
fn safety_comment(lines: &[&str], line: usize) -> Option<String> {
    let above = lines_above(lines, line, "//");
    let start = above.iter().position(|l| l.starts_with("SAFETY:"))?;
    let text = above.get(start..)?.join(" ");
    Some(first_sentence(text.trim_start_matches("SAFETY:")))
}

/// The section `# Safety` of the documentation above a line, its first sentence.
fn safety_section(lines: &[&str], line: usize) -> Option<String> {
    let above = lines_above(lines, line, "///");
    let start = above.iter().position(|l| l == "# Safety")?;
    let text = above.get(start + 1..)?.join(" ");
    Some(first_sentence(&text))
}

/// The text of the comment lines right above a line, top first. Attributes may stand between.
fn lines_above(lines: &[&str], line: usize, marker: &str) -> Vec<String> {
    let before = lines.get(..line.saturating_sub(1)).unwrap_or(&[]);
    let mut text: Vec<_> = before
        .iter()
        .rev()
        .map(|l| l.trim())
        .take_while(|l| l.starts_with(marker) || l.starts_with("#["))
        .filter_map(|l| l.strip_prefix(marker))
        .map(|l| l.trim().to_owned())
        .collect();
    text.reverse();
    text
}

fn first_sentence(text: &str) -> String {
    let text = text.trim();
    let end = text.find(". ").unwrap_or(text.len());
    let sentence = text.get(..end).unwrap_or(text);
    sentence.trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::conditions::Conditions;
    use super::*;
    use std::path::Path;

    fn find(text: &str) -> Vec<Use> {
        uses(&SourceFile::parse(Path::new("x.rs"), text.into(), &Conditions::default()).unwrap())
    }

    fn reasons(text: &str) -> Vec<Option<String>> {
        find(text).into_iter().map(|one| one.reason).collect()
    }

    #[test]
    fn comment_above_the_block_or_its_statement_is_found() {
        let text = "fn f() {\n    // SAFETY: it is ours. Really.\n    unsafe { g() };\n}\n";
        assert_eq!(reasons(text), [Some("it is ours".into())]);
        let text = "fn f() {\n    // SAFETY: ours,\n    // all of it.\n    let x =\n        unsafe { g() };\n}\n";
        assert_eq!(reasons(text), [Some("ours, all of it".into())]);
    }

    #[test]
    fn missing_comments_are_seen() {
        assert_eq!(
            reasons("fn f() {\n    // Because.\n    unsafe { g() }\n}\n"),
            [None]
        );
        let apart = "fn f() {\n    // SAFETY: of this one.\n    unsafe { g() };\n    h();\n    unsafe { g() };\n}\n";
        assert_eq!(reasons(apart), [Some("of this one".into()), None]);
        assert_eq!(reasons("/// Words.\nunsafe fn f() {}\n"), [None]);
    }

    #[test]
    fn functions_have_a_section() {
        let text = "/// Does.\n///\n/// # Safety\n///\n/// Call it once. Or never.\n#[inline]\nunsafe fn f() {}\n";
        assert_eq!(reasons(text), [Some("Call it once".into())]);
    }

    #[test]
    fn functions_of_a_trait_have_its_contract() {
        let text = "impl T for A {\n    unsafe fn f() {}\n}\nimpl A {\n    unsafe fn f() {}\n}\n";
        assert_eq!(reasons(text), [Some("as `T` says".into()), None]);
    }

    #[test]
    fn blocks_inside_macros_count() {
        let text = "macro_rules! m {\n    () => {\n        // SAFETY: none of it.\n        unsafe { g() }\n    };\n}\n";
        let found = find(text);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].kind, found[0].line), (Kind::Block, 4));
        assert_eq!(found[0].within, "m!");
        assert_eq!(found[0].reason.as_deref(), Some("none of it"));
    }

    #[test]
    fn every_kind_is_told_apart() {
        let text = "// SAFETY: s.\nunsafe impl Send for A<u8> {}\nunsafe extern \"C\" { fn x(); }\n\
                    #[unsafe(no_mangle)]\nfn f() {}\nunsafe trait T {}\n";
        let kinds: Vec<_> = find(text).iter().map(|one| one.kind).collect();
        let expected = [Kind::Impl, Kind::Extern, Kind::Attribute, Kind::Trait];
        assert_eq!(kinds, expected);
    }
}
