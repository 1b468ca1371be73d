//! The text of `/metrics`, read back.

/// Samples of one scrape.
#[derive(Debug, Clone)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Debug, Clone)]
struct Sample {
    name: String,
    labels: String,
    value: f64,
}

impl Metrics {
    /// Reads Prometheus text.
    ///
    /// # Panics
    /// When a line is neither a comment nor a sample.
    pub fn parse(text: &str) -> Metrics {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        Metrics {
            samples: lines.map(sample).collect(),
        }
    }

    /// Sum over all samples of this name whose labels contain `labels` (`endpoint="x"` for example; empty takes all).
    /// `None` when there is no such sample.
    pub fn sum(&self, name: &str, labels: &str) -> Option<f64> {
        let found = self
            .samples
            .iter()
            .filter(|s| s.name == name && s.labels.contains(labels));
        found.map(|s| s.value).reduce(|a, b| a + b)
    }

    /// All names.
    pub fn names(&self) -> std::collections::BTreeSet<&str> {
        self.samples.iter().map(|s| s.name.as_str()).collect()
    }
}

fn sample(line: &str) -> Sample {
    let parse = || {
        let (key, value) = line.rsplit_once(' ')?;
        let (name, labels) = key.split_once('{').unwrap_or((key, ""));
        Some(Sample {
            name: name.to_owned(),
            labels: labels.to_owned(),
            value: value.parse().ok()?,
        })
    };
    parse().unwrap_or_else(|| panic!("not a line of Prometheus text: {line:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_name_are_summed_by_label() {
        let metrics = Metrics::parse("# HELP a x\na{r=\"1\"} 2\na{r=\"2\"} 3.5\nb 1\n");
        assert_eq!(metrics.sum("a", ""), Some(5.5));
        assert_eq!(metrics.sum("a", "r=\"2\""), Some(3.5));
        assert_eq!(metrics.sum("c", ""), None);
    }
}
