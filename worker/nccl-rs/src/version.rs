//! NCCL's version.

use std::fmt;

/// A version of NCCL. Ordered as versions are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2 of 2.27.3.
    pub major: u32,
    /// 27 of 2.27.3.
    pub minor: u32,
    /// 3 of 2.27.3.
    pub patch: u32,
}

impl Version {
    pub(crate) const fn new(major: u32, minor: u32, patch: u32) -> Version {
        Version {
            major,
            minor,
            patch,
        }
    }

    /// NCCL's version number has two digits for the minor version since 2.9 (22703 is 2.27.3), one before (2804 is
    /// 2.8.4).
    pub(crate) fn from_code(code: u32) -> Version {
        let unit = if code < 10_000 { 1_000 } else { 10_000 };
        Version::new(code / unit, code % unit / 100, code % 100)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_numbers_of_both_kinds_are_read() {
        assert_eq!(Version::from_code(2804), Version::new(2, 8, 4));
        assert_eq!(Version::from_code(21212).to_string(), "2.12.12");
        assert!(Version::from_code(2708) < Version::from_code(22703));
    }
}
