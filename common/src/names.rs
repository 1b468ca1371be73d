//! What endpoints and served entities may be called: one rule for the API and for cluster.toml.
//!
//! Pure. Whether a name is taken is not known here.

/// Longest name.
pub const NAME_CHARS_MAX: usize = 63;
/// Words that stand in some path where endpoints' names stand.
const RESERVED: [&str; 7] = [
    "chat",
    "completions",
    "embeddings",
    "get-model-optimization-info",
    "models",
    "pt",
    "v1",
];
/// The vendor's own endpoints are called so; clients treat such names specially.
const RESERVED_PREFIX: &str = "databricks-";
/// Most of a wrong name that a message repeats.
const SHOWN_CHARS_MAX: usize = 40;

/// Why a name is not one. Reads on after the field's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Too long, empty, or with other characters.
    #[error(
        "must be 1 to {NAME_CHARS_MAX} letters, digits, '-' and '_', beginning with a letter or digit, got {0}"
    )]
    Form(String),
    /// Not free to be given.
    #[error(
        "'{0}' is reserved, as are {words} and everything that begins with {RESERVED_PREFIX}",
        words = RESERVED.join(", ")
    )]
    Reserved(String),
}

/// Checks the name of a served entity.
///
/// # Errors
/// [`NameError::Form`].
pub fn check_entity(name: &str) -> Result<(), NameError> {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if starts_well && name.chars().all(allowed) && name.len() <= NAME_CHARS_MAX {
        return Ok(());
    }
    let shown: String = name.chars().take(SHOWN_CHARS_MAX).collect();
    let cut = if shown.len() < name.len() { "..." } else { "" };
    Err(NameError::Form(format!("{shown:?}{cut}")))
}

/// Checks the name of an endpoint.
///
/// # Errors
/// [`NameError`].
pub fn check_endpoint(name: &str) -> Result<(), NameError> {
    check_entity(name)?;
    if RESERVED.contains(&name) || name.starts_with(RESERVED_PREFIX) {
        return Err(NameError::Reserved(name.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_digits_dashes_and_underscores_make_a_name() {
        for good in ["a", "7b", "Llama-2_7b", &"x".repeat(63)] {
            assert_eq!(check_endpoint(good), Ok(()), "{good}");
        }
        for bad in ["", "-a", "_a", "a.b", "a/b", "a b", "é", &"x".repeat(64)] {
            let error = check_entity(bad).unwrap_err();
            assert!(matches!(error, NameError::Form(_)), "{bad}");
            assert_eq!(check_endpoint(bad), Err(error));
        }
    }

    #[test]
    fn words_of_paths_and_of_the_vendor_are_no_endpoints_but_may_be_entities() {
        for word in [
            "chat",
            "completions",
            "embeddings",
            "models",
            "v1",
            "pt",
            "get-model-optimization-info",
            "databricks-dbrx",
        ] {
            assert_eq!(
                check_endpoint(word),
                Err(NameError::Reserved(word.into())),
                "{word}"
            );
            assert_eq!(check_entity(word), Ok(()), "{word}");
        }
        assert_eq!(check_endpoint("chat-2"), Ok(()));
    }

    #[test]
    fn messages_say_what_is_allowed_and_do_not_repeat_a_book() {
        assert_eq!(
            check_entity("a/b").unwrap_err().to_string(),
            "must be 1 to 63 letters, digits, '-' and '_', beginning with a letter or digit, got \"a/b\""
        );
        assert_eq!(
            check_endpoint("v1").unwrap_err().to_string(),
            "'v1' is reserved, as are chat, completions, embeddings, get-model-optimization-info, models, pt, v1 and \
             everything that begins with databricks-"
        );
        assert!(
            check_entity(&"x".repeat(1 << 20))
                .unwrap_err()
                .to_string()
                .len()
                < 200
        );
    }
}
