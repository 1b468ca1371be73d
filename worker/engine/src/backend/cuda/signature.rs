//! The heads of kernels, read from their sources: `KERNEL(256, name, (const float* x, int n)) {`.
//!
//! Owns the little of C++ that such a head may hold: pointers to numbers, and numbers. Compiled twice: by the build
//! script, which writes the launchers from it, and with the crate's tests.

/// What a kernel is called with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// Its name, as in the cubin.
    pub name: String,
    /// In order.
    pub parameters: Vec<Parameter>,
}

/// One parameter of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// A name that Rust takes too.
    pub name: String,
    /// Its kind and number format.
    pub kind: Kind,
}

/// How a parameter is passed. The text is the type in Rust.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `const T*`.
    Read(&'static str),
    /// `T*`.
    Write(&'static str),
    /// `T`.
    Value(&'static str),
}

impl Kind {
    /// The type of the launcher's argument.
    pub fn rust(self) -> String {
        match self {
            Kind::Read(to) => format!("Ptr<{to}>"),
            Kind::Write(to) => format!("PtrMut<{to}>"),
            Kind::Value(of) => of.to_owned(),
        }
    }

    /// Bytes that it takes in the kernel's parameters.
    pub fn bytes(self) -> usize {
        match self {
            Kind::Value("i32" | "u32" | "f32") => 4,
            _ => 8,
        }
    }
}

/// Types that may stand behind a pointer: in C++ and in Rust.
const POINTED: [(&str, &str); 8] = [
    ("float", "f32"),
    ("bf16", "bf16"),
    ("int", "i32"),
    ("unsigned", "u32"),
    ("unsigned char", "u8"),
    ("signed char", "i8"),
    ("long long", "i64"),
    ("Draw", "Draw"),
];

/// Types that may be passed by value.
const VALUES: [(&str, &str); 4] = [
    ("float", "f32"),
    ("int", "i32"),
    ("unsigned", "u32"),
    ("long long", "i64"),
];

/// The heads of all kernels in a source, in order.
///
/// # Errors
/// `line N: ...`: a head that does not follow the form, or names a type that no launcher has.
pub fn parse(source: &str) -> Result<Vec<Signature>, String> {
    let mut found: Vec<Signature> = Vec::new();
    for (at, _) in source.match_indices("KERNEL(") {
        let line_start = source[..at].rfind('\n').map_or(0, |newline| newline + 1);
        // A comment about kernels, or the macro itself.
        if line_start != at {
            continue;
        }
        let line = source[..at].matches('\n').count() + 1;
        let signature = head(&source[at + "KERNEL(".len()..])
            .map_err(|reason| format!("line {line}: {reason}"))?;
        if found.iter().any(|other| other.name == signature.name) {
            return Err(format!("line {line}: a second kernel {}", signature.name));
        }
        found.push(signature);
    }
    Ok(found)
}

/// Parses `THREADS, name, (parameters)) {` and what follows.
fn head(text: &str) -> Result<Signature, String> {
    const FORM: &str = "expected KERNEL(threads, name, (parameters)) {";
    let (threads, rest) = text.split_once(',').ok_or(FORM)?;
    let (name, rest) = rest.split_once(',').ok_or(FORM)?;
    let (threads, name) = (threads.trim(), name.trim());
    if !is_word(threads) && threads.parse::<u32>().is_err() {
        return Err(format!("{FORM}; the threads are {threads:?}"));
    }
    if !is_name(name) {
        return Err(format!("{FORM}; the name is {name:?}"));
    }
    let in_kernel = |reason: String| format!("kernel {name}: {reason}");
    let rest = rest.trim_start().strip_prefix('(').ok_or(FORM)?;
    let (list, rest) = rest
        .split_once(')')
        .ok_or_else(|| in_kernel("its parameters have no end".into()))?;
    let after: String = rest
        .chars()
        .filter(|c| !c.is_whitespace())
        .take(2)
        .collect();
    if after != "){" {
        return Err(in_kernel(format!(
            "{FORM}; behind the parameters is {after:?}"
        )));
    }
    let mut parameters: Vec<Parameter> = Vec::new();
    for text in list.split(',') {
        let parameter = parameter(text.trim()).map_err(in_kernel)?;
        if parameters.iter().any(|other| other.name == parameter.name) {
            return Err(in_kernel(format!("two parameters {}", parameter.name)));
        }
        parameters.push(parameter);
    }
    Ok(Signature {
        name: name.to_owned(),
        parameters,
    })
}

/// Parses `const float* x` or `int n`.
fn parameter(text: &str) -> Result<Parameter, String> {
    let (constant, rest) = match text.strip_prefix("const ") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (kind, name) = match rest.rsplit_once('*') {
        Some((pointed, name)) => {
            let rust = lookup(&POINTED, pointed).ok_or_else(|| {
                format!(
                    "{text:?} points to {:?}; launchers know {}",
                    pointed.trim(),
                    names(&POINTED)
                )
            })?;
            (
                if constant {
                    Kind::Read(rust)
                } else {
                    Kind::Write(rust)
                },
                name,
            )
        }
        None => {
            let (value, name) = rest
                .rsplit_once(' ')
                .ok_or_else(|| format!("{text:?} is no parameter: a type and a name"))?;
            let rust = lookup(&VALUES, value)
                .filter(|_| !constant)
                .ok_or_else(|| {
                    format!(
                        "{text:?} is of type {value:?}; launchers know {} and pointers",
                        names(&VALUES)
                    )
                })?;
            (Kind::Value(rust), name)
        }
    };
    if !is_name(name.trim()) {
        return Err(format!("{text:?} has no name that Rust takes"));
    }
    Ok(Parameter {
        name: name.trim().to_owned(),
        kind,
    })
}

fn lookup(types: &[(&str, &'static str)], wanted: &str) -> Option<&'static str> {
    let found = types.iter().find(|(cpp, _)| *cpp == wanted.trim());
    found.map(|(_, rust)| *rust)
}

fn names(types: &[(&str, &str)]) -> String {
    types
        .iter()
        .map(|(cpp, _)| *cpp)
        .collect::<Vec<_>>()
        .join(", ")
}

/// A name in C++ and, being in lower case and no keyword, an ordinary one in Rust.
fn is_name(text: &str) -> bool {
    const KEYWORDS: [&str; 8] = ["box", "fn", "in", "let", "match", "move", "ref", "type"];
    is_word(text) && text.chars().all(|c| !c.is_ascii_uppercase()) && !KEYWORDS.contains(&text)
}

fn is_word(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(name: &str, of: &'static str) -> Parameter {
        Parameter {
            name: name.to_owned(),
            kind: Kind::Value(of),
        }
    }

    #[test]
    fn all_kinds_of_parameters_are_read() {
        let source = "// KERNEL(1, not_this, (int n))\n#define KERNEL(t, n, p) p\n\
            KERNEL(THREADS, embed, (float* out, const bf16* table, const unsigned char* q,\n    long long n, float eps)) {\n}\n\
            KERNEL(128, sample_rows, (unsigned* out, const Draw* draws, unsigned first, int k) ) {\n";
        let found = parse(source).expect("well formed");
        assert_eq!(
            found,
            [
                Signature {
                    name: "embed".into(),
                    parameters: vec![
                        Parameter {
                            name: "out".into(),
                            kind: Kind::Write("f32")
                        },
                        Parameter {
                            name: "table".into(),
                            kind: Kind::Read("bf16")
                        },
                        Parameter {
                            name: "q".into(),
                            kind: Kind::Read("u8")
                        },
                        value("n", "i64"),
                        value("eps", "f32"),
                    ],
                },
                Signature {
                    name: "sample_rows".into(),
                    parameters: vec![
                        Parameter {
                            name: "out".into(),
                            kind: Kind::Write("u32")
                        },
                        Parameter {
                            name: "draws".into(),
                            kind: Kind::Read("Draw")
                        },
                        value("first", "u32"),
                        value("k", "i32"),
                    ],
                },
            ]
        );
        let types: Vec<String> = found[0].parameters.iter().map(|p| p.kind.rust()).collect();
        assert_eq!(types, ["PtrMut<f32>", "Ptr<bf16>", "Ptr<u8>", "i64", "f32"]);
        let bytes: Vec<usize> = found[1].parameters.iter().map(|p| p.kind.bytes()).collect();
        assert_eq!(bytes, [8, 8, 4, 4]);
    }

    #[test]
    fn a_malformed_head_is_named_with_its_line() {
        for (head, expected) in [
            (
                "KERNEL(256, add) {",
                "line 2: expected KERNEL(threads, name, (parameters)) {",
            ),
            (
                "KERNEL(256 + 1, add, (int n)) {",
                "the threads are \"256 + 1\"",
            ),
            ("KERNEL(256, Add, (int n)) {", "the name is \"Add\""),
            ("KERNEL(256, add, (int n) {", "kernel add: expected"),
            (
                "KERNEL(256, add, (int n",
                "kernel add: its parameters have no end",
            ),
            (
                "KERNEL(256, add, (double x)) {",
                "\"double x\" is of type \"double\"; launchers know float, int",
            ),
            (
                "KERNEL(256, add, (const half* x)) {",
                "\"const half* x\" points to \"half\"; launchers know float, bf16",
            ),
            ("KERNEL(256, add, (int)) {", "\"int\" is no parameter"),
            ("KERNEL(256, add, ()) {", "\"\" is no parameter"),
            (
                "KERNEL(256, add, (const int n)) {",
                "\"const int n\" is of type \"int\"",
            ),
            (
                "KERNEL(256, add, (int in)) {",
                "\"int in\" has no name that Rust takes",
            ),
            (
                "KERNEL(256, add, (int n, float n)) {",
                "kernel add: two parameters n",
            ),
            (
                "KERNEL(9, one, (int n)) {}\nKERNEL(9, one, (int n)) {}",
                "line 3: a second kernel one",
            ),
        ] {
            let error = parse(&format!("// A comment.\n{head}")).expect_err(head);
            assert!(
                error.starts_with("line ") && error.contains(expected),
                "{head}: {error}"
            );
        }
    }
}
