//! The parameters that all generation formats share, as checked types.
//!
//! Pure: random seeds come from the caller. The formats differ in defaults and in a few names ([`Format`]).

use common::request::{Generate, Prompt, Sampling, Stop};
use serde_json::Value;

use super::json::{Field, FieldError, Fields, whole};

/// Most prompts in one call: as many as may wait for a served entity by default, or no queue could ever take them.
pub(super) const PROMPTS_MAX: usize = 256;
/// Most answers of one call, over all its prompts.
pub(super) const CHOICES_MAX: usize = 1024;
/// Most stop token ids.
pub(super) const STOP_TOKEN_IDS_MAX: usize = 256;

/// Every name that [`Options::read`] knows, over all formats.
pub(super) const NAMES: [&str; 17] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "candidate_count",
    "min_tokens",
];

/// What differs between formats.
pub(super) struct Format {
    /// Unless told.
    pub temperature: f32,
    /// Most output tokens unless told; `None` is what fits.
    pub tokens_max: Option<u32>,
    /// Least value of `max_tokens`; 0 scores the prompt only.
    pub tokens_least: u32,
    /// The names of `max_tokens`, the preferred one first.
    pub tokens_keys: [&'static str; 2],
    /// The name of the number of answers per prompt.
    pub candidates_key: &'static str,
}

/// Databricks' predictions.
pub(super) const PREDICTIONS: Format = Format {
    temperature: 0.0,
    tokens_max: None,
    tokens_least: 1,
    tokens_keys: ["max_tokens", "max_tokens"],
    candidates_key: "candidate_count",
};

/// OpenAI's completions.
pub(super) const COMPLETIONS: Format = Format {
    temperature: 1.0,
    tokens_max: Some(16),
    tokens_least: 0,
    tokens_keys: ["max_tokens", "max_completion_tokens"],
    candidates_key: "n",
};

/// OpenAI's chat.
pub(super) const CHAT: Format = Format {
    temperature: 1.0,
    tokens_max: None,
    tokens_least: 1,
    tokens_keys: ["max_completion_tokens", "max_tokens"],
    candidates_key: "n",
};

/// Checked parameters of one or more prompts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    sampling: Sampling,
    /// Whether the client chose the seed.
    seeded: bool,
    stop: Stop,
    pub candidates: u32,
}

impl Options {
    pub fn read(fields: &Fields<'_>, format: &Format) -> Result<Self, FieldError> {
        if let Some(field) = fields
            .get("min_tokens")
            .filter(|field| whole(field.value) != Some(0))
        {
            return Err(field.refuse("is not supported by this server: leave it out"));
        }
        let seed = fields.get("seed").map(|field| seed(&field)).transpose()?;
        let candidates = match fields.get(format.candidates_key) {
            Some(field) => field.whole(1..=i128::from(Generate::CANDIDATES_MAX))? as u32,
            None => 1,
        };
        Ok(Options {
            sampling: sampling(fields, format, seed)?,
            seeded: seed.is_some(),
            stop: stop(fields, format)?,
            candidates,
        })
    }

    /// A request for this prompt. Without a client's seed each prompt draws its own, so that equal prompts may differ.
    pub fn generate(&self, prompt: Prompt, draw_seed: &mut dyn FnMut() -> u64) -> Generate {
        let mut sampling = self.sampling.clone();
        if !self.seeded {
            sampling.seed = draw_seed();
        }
        let (stop, candidates) = (self.stop.clone(), self.candidates);
        Generate {
            sampling,
            stop,
            candidates,
            ..Generate::new(prompt)
        }
    }
}

fn sampling(
    fields: &Fields<'_>,
    format: &Format,
    seed: Option<u64>,
) -> Result<Sampling, FieldError> {
    let number = |key, default| fields.get(key).map_or(Ok(default), |field| field.number());
    let off = Sampling::default();
    let sampling = Sampling {
        temperature: number("temperature", format.temperature)?,
        top_k: fields
            .get("top_k")
            .map_or(Ok(off.top_k), |field| top_k(&field))?,
        top_p: number("top_p", off.top_p)?,
        min_p: number("min_p", off.min_p)?,
        repetition_penalty: number("repetition_penalty", off.repetition_penalty)?,
        presence_penalty: number("presence_penalty", off.presence_penalty)?,
        frequency_penalty: number("frequency_penalty", off.frequency_penalty)?,
        logit_bias: fields
            .get("logit_bias")
            .map_or(Ok(Vec::new()), |field| logit_bias(&field))?,
        seed: seed.unwrap_or(off.seed),
    };
    sampling
        .check()
        .map_err(|error| match fields.get(error.field) {
            Some(field) => field.wrong(error.allowed),
            None => FieldError::at(
                error.field,
                format!("must be {}, got {}", error.allowed, error.got),
            ),
        })?;
    Ok(sampling)
}

/// Any integer of 64 bits, signed or not.
fn seed(field: &Field<'_>) -> Result<u64, FieldError> {
    let number = field.whole(i128::from(i64::MIN)..=i128::from(u64::MAX))?;
    Ok(number as u64)
}

/// -1 is how other servers spell "all tokens".
fn top_k(field: &Field<'_>) -> Result<u32, FieldError> {
    Ok(field.whole(-1..=i128::from(u32::MAX))?.max(0) as u32)
}

fn logit_bias(field: &Field<'_>) -> Result<Vec<(u32, f32)>, FieldError> {
    let object = field.object()?;
    let fields = field.fields()?;
    let mut biases = Vec::with_capacity(object.len().min(Sampling::LOGIT_BIAS_MAX));
    for key in object.keys() {
        let id = key
            .parse()
            .map_err(|_| field.refuse(format!("must have token ids for keys, got {key:?}")))?;
        // A null bias is none.
        if let Some(bias) = fields.get(key) {
            let value = bias.number()?;
            if !Sampling::LOGIT_BIAS.contains(&value) {
                return Err(bias.wrong("between -100 and 100"));
            }
            biases.push((id, value));
        }
    }
    Ok(biases)
}

fn stop(fields: &Fields<'_>, format: &Format) -> Result<Stop, FieldError> {
    let tokens_max = match format.tokens_keys.iter().find_map(|key| fields.get(key)) {
        Some(field) => Some(tokens_max(&field, format.tokens_least)?),
        None => format.tokens_max,
    };
    Ok(Stop {
        strings: fields
            .get("stop")
            .map_or(Ok(Vec::new()), |field| stop_strings(&field))?,
        token_ids: fields
            .get("stop_token_ids")
            .map_or(Ok(Vec::new()), |field| {
                token_ids(&field, STOP_TOKEN_IDS_MAX)
            })?,
        ignore_eos: fields.flag("ignore_eos")?,
        tokens_max,
    })
}

/// More than any context is the same as what fits.
fn tokens_max(field: &Field<'_>, least: u32) -> Result<u32, FieldError> {
    match whole(field.value) {
        Some(n) if n >= i128::from(least) => Ok(u32::try_from(n).unwrap_or(u32::MAX)),
        _ => Err(field.wrong(&format!("a whole number of at least {least}"))),
    }
}

fn stop_strings(field: &Field<'_>) -> Result<Vec<String>, FieldError> {
    if field.value.is_string() {
        return Ok(vec![stop_string(field)?]);
    }
    let Value::Array(values) = field.value else {
        return Err(field.wrong("a string or a list of strings"));
    };
    if values.len() > Stop::STRINGS_MAX {
        let (most, got) = (Stop::STRINGS_MAX, values.len());
        return Err(field.refuse(format!("must have at most {most} strings, got {got}")));
    }
    values
        .iter()
        .enumerate()
        .map(|(i, value)| stop_string(&field.item(i, value)))
        .collect()
}

fn stop_string(field: &Field<'_>) -> Result<String, FieldError> {
    let text = field.text()?;
    if text.is_empty() || text.len() > Stop::STRING_BYTES_MAX {
        let (most, got) = (Stop::STRING_BYTES_MAX, text.len());
        return Err(field.refuse(format!("must be 1 to {most} bytes long, got {got}")));
    }
    Ok(text.to_owned())
}

/// A list of token ids.
pub(super) fn token_ids(field: &Field<'_>, most: usize) -> Result<Vec<u32>, FieldError> {
    let values = field.list()?;
    if values.len() > most {
        return Err(field.refuse(format!(
            "must have at most {most} token ids, got {}",
            values.len()
        )));
    }
    let id = |(i, value)| match whole(value).map(u32::try_from) {
        Some(Ok(id)) => Ok(id),
        _ => Err(field.item(i, value).wrong("a token id")),
    };
    values.iter().enumerate().map(id).collect()
}

/// Refuses calls that ask for too much at once.
pub(super) fn check_size(prompts: usize, choices: usize, key: &str) -> Result<(), FieldError> {
    if prompts == 0 {
        return Err(FieldError::at(key, "has no prompt: give at least one"));
    }
    if prompts > PROMPTS_MAX {
        let why = format!(
            "has {prompts} prompts; one call takes at most {PROMPTS_MAX}: send several calls"
        );
        return Err(FieldError::at(key, why));
    }
    if choices > CHOICES_MAX {
        let why = format!(
            "asks for {choices} answers; one call gives at most {CHOICES_MAX}: send several calls"
        );
        return Err(FieldError::at(key, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
