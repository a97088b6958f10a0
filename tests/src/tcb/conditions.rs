//! Conditional compilation: which `#[cfg(...)]` hold when the EL2 image is built.

use anyhow::{Context, Result, ensure};
use std::collections::HashSet;
use std::process::Command;
use syn::punctuated::Punctuated;
use syn::{Attribute, Expr, Lit, Meta, Token};

/// The target that the image is built for.
pub(crate) const TARGET: &str = "aarch64-unknown-none-softfloat";

/// The conditions that hold: `name`, or `key="value"`, as `rustc --print cfg` writes them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conditions {
    set: HashSet<String>,
}

impl Conditions {
    /// Those of the image's target, without features, tests, models or debug assertions.
    ///
    /// # Errors
    /// The compiler cannot be run.
    pub(crate) fn of_image() -> Result<Self> {
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
        let output = Command::new(&rustc)
            .args(["--print", "cfg", "--target", TARGET])
            .output()
            .with_context(|| format!("cannot run {rustc}"))?;
        ensure!(output.status.success(), "{rustc} does not know {TARGET}");
        let text = String::from_utf8(output.stdout)?;
        Ok(Self::new(
            text.lines().filter(|line| *line != "debug_assertions"),
        ))
    }

    /// Exactly these.
    pub(crate) fn new<'a>(set: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            set: set.into_iter().map(str::to_owned).collect(),
        }
    }

    /// These and a package's features.
    pub(crate) fn with_features<'a>(&self, features: impl IntoIterator<Item = &'a str>) -> Self {
        let mut more = self.clone();
        more.set
            .extend(features.into_iter().map(|f| format!("feature=\"{f}\"")));
        more
    }

    /// Whether something with these attributes is compiled.
    pub(crate) fn keep(&self, attributes: &[Attribute]) -> bool {
        attributes
            .iter()
            .filter(|a| a.path().is_ident("cfg"))
            .all(|a| a.parse_args::<Meta>().is_ok_and(|meta| self.hold(&meta)))
    }

    /// Whether one predicate holds (The Rust Reference, "Conditional compilation").
    pub(crate) fn hold(&self, predicate: &Meta) -> bool {
        match predicate {
            Meta::Path(path) => path
                .get_ident()
                .is_some_and(|name| self.set.contains(&name.to_string())),
            Meta::NameValue(pair) => pair
                .path
                .get_ident()
                .zip(string(&pair.value))
                .is_some_and(|(key, value)| self.set.contains(&format!("{key}=\"{value}\""))),
            Meta::List(list) => {
                let parse = Punctuated::<Meta, Token![,]>::parse_terminated;
                let Ok(parts) = list.parse_args_with(parse) else {
                    return false;
                };
                let mut parts = parts.iter();
                if list.path.is_ident("not") {
                    !parts.any(|part| self.hold(part))
                } else if list.path.is_ident("any") {
                    parts.any(|part| self.hold(part))
                } else {
                    list.path.is_ident("all") && parts.all(|part| self.hold(part))
                }
            }
        }
    }
}

/// The text of a string literal.
pub(crate) fn string(value: &Expr) -> Option<String> {
    match value {
        Expr::Lit(literal) => match &literal.lit {
            Lit::Str(text) => Some(text.value()),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(predicate: &str) -> bool {
        let image = Conditions::new(["target_os=\"none\"", "target_arch=\"aarch64\""]);
        let image = image.with_features(["alloc"]);
        image.hold(&syn::parse_str(predicate).unwrap())
    }

    #[test]
    fn predicates_are_evaluated() {
        assert!(holds("target_os = \"none\""));
        assert!(holds("feature = \"alloc\""));
        assert!(!holds("test"));
        assert!(!holds("feature = \"std\""));
        assert!(holds("all(target_os = \"none\", not(test))"));
        assert!(!holds("any(test, feature = \"testing\")"));
        assert!(!holds("not(all(target_os = \"none\"))"));
    }
}
