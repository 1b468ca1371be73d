//! Which model: a registered name and a version, as clients and registries write them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A registered model's name (1 or 3 levels, `catalog.schema.model`) and its version number.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ModelRef {
    /// The registered name.
    pub name: String,
    /// The version: digits.
    pub version: String,
}

/// Why a name or version is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelRefError {
    /// The name has another number of levels, an empty level or a character that is not allowed.
    #[error(
        "model name '{0}' must have one level or three (catalog.schema.model) of letters, digits, '-' and '_', at most {max} characters",
        max = ModelRef::NAME_MAX
    )]
    Name(String),
    /// The version is not a positive number.
    #[error("model version '{0}' must be a positive whole number")]
    Version(String),
}

impl ModelRef {
    /// Longest name accepted.
    pub const NAME_MAX: usize = 255;

    /// Checks and takes a name and a version.
    ///
    /// # Errors
    /// [`ModelRefError`] says which part is wrong and what is allowed.
    pub fn new(name: &str, version: &str) -> Result<Self, ModelRefError> {
        Self::check_name(name)?;
        Ok(ModelRef {
            name: name.to_owned(),
            version: Self::check_version(version)?,
        })
    }

    /// Checks a name alone.
    ///
    /// # Errors
    /// [`ModelRefError::Name`].
    pub fn check_name(name: &str) -> Result<(), ModelRefError> {
        let levels: Vec<&str> = name.split('.').collect();
        let level_ok = |level: &&str| {
            !level.is_empty()
                && level
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        };
        if name.len() > Self::NAME_MAX
            || !matches!(levels.len(), 1 | 3)
            || !levels.iter().all(level_ok)
        {
            return Err(ModelRefError::Name(name.to_owned()));
        }
        Ok(())
    }

    /// Checks a version alone and gives its digits without leading zeros.
    ///
    /// # Errors
    /// [`ModelRefError::Version`].
    pub fn check_version(version: &str) -> Result<String, ModelRefError> {
        match version.parse::<u32>() {
            Ok(number) if number > 0 => Ok(number.to_string()),
            _ => Err(ModelRefError::Version(version.to_owned())),
        }
    }

    /// The last level of the name: `llama-13b` of `ml.llm-catalog.llama-13b`.
    pub fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }

    /// What a served entity of this model is called unless it is given a name: `llama-13b-3`.
    pub fn entity_name(&self) -> String {
        format!("{}-{}", self.short_name(), self.version)
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} version {}", self.name, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_and_three_levels_are_names_and_two_are_not() {
        assert!(ModelRef::new("mpt", "1").is_ok());
        assert_eq!(
            ModelRef::new("ml.llm-catalog.llama-13b", "3")
                .unwrap()
                .short_name(),
            "llama-13b"
        );
        assert_eq!(
            ModelRef::new("ml.llm-catalog.llama-13b", "3")
                .unwrap()
                .entity_name(),
            "llama-13b-3"
        );
        let longest = "x".repeat(ModelRef::NAME_MAX);
        assert!(ModelRef::new(&longest, "1").is_ok());
        assert!(ModelRef::new(&(longest + "x"), "1").is_err());
        assert!(matches!(
            ModelRef::new("a.b", "1"),
            Err(ModelRefError::Name(_))
        ));
        assert!(matches!(
            ModelRef::new("a..b", "1"),
            Err(ModelRefError::Name(_))
        ));
        assert!(matches!(
            ModelRef::new("../etc/passwd", "1"),
            Err(ModelRefError::Name(_))
        ));
    }

    #[test]
    fn versions_are_positive_numbers_and_lose_leading_zeros() {
        assert_eq!(ModelRef::new("m", "007").unwrap().version, "7");
        for bad in ["0", "-1", "latest", "", "1.0"] {
            assert!(
                matches!(ModelRef::new("m", bad), Err(ModelRefError::Version(_))),
                "{bad}"
            );
        }
    }
}
