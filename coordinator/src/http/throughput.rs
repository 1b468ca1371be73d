//! The fields of a served entity that is sized by tokens per second instead of by workload size.
//!
//! Pure. What may be asked for of a model is the cluster's matter: it knows what its devices give.

use super::json::{Field, FieldError, Fields};
use crate::api::Provisioned;

/// No more is believed.
pub(super) const RATE_MAX: i128 = 1_000_000_000_000;
/// What throughput stands instead of.
const INSTEAD_OF: [&str; 3] = [
    "workload_size",
    "min_provisioned_concurrency",
    "max_provisioned_concurrency",
];

/// The throughput that is asked for, if any is.
pub(super) fn of(fields: &Fields<'_>) -> Result<Option<Provisioned>, FieldError> {
    if let Some(burst) = fields.get("burst_scaling_enabled")
        && burst.flag()?
    {
        return Err(burst.refuse("must be false: bursts beyond what was asked for are not served"));
    }
    let (min, max, units) = (
        fields.get("min_provisioned_throughput"),
        fields.get("max_provisioned_throughput"),
        fields.get("provisioned_model_units"),
    );
    let Some(first) = units.as_ref().or(max.as_ref()).or(min.as_ref()) else {
        return Ok(None);
    };
    for key in INSTEAD_OF {
        if let Some(other) = fields.get(key) {
            return Err(other.refuse(format!(
                "and {} cannot stand together: throughput sizes the entity",
                first.path
            )));
        }
    }
    if let Some(field) = fields.get("scale_to_zero_enabled")
        && field.flag()?
    {
        return Err(field.refuse("must be false beside provisioned throughput, or be left out"));
    }
    let asked = match units {
        Some(units) => {
            if let Some(rate) = max.or(min) {
                return Err(rate.refuse(format!(
                    "and {} say the same thing: give one of them",
                    units.path
                )));
            }
            Provisioned {
                min_tokens_per_s: 0,
                max_tokens_per_s: 0,
                model_units: Some(rate(&units, 1)?),
            }
        }
        None => rates(min, max)?,
    };
    Ok(Some(asked))
}

/// The least may be absent or 0; the most is the least unless it is given.
fn rates(min: Option<Field<'_>>, max: Option<Field<'_>>) -> Result<Provisioned, FieldError> {
    let least = min.as_ref().map_or(Ok(0), |field| rate(field, 0))?;
    let most = match (&max, &min) {
        (Some(field), _) => rate(field, 1)?,
        (None, Some(field)) => rate(field, 1)?,
        (None, None) => 0,
    };
    match max {
        Some(field) if most < least => Err(field.refuse(format!(
            "must be at least min_provisioned_throughput, {least}, got {most}"
        ))),
        _ => Ok(Provisioned {
            min_tokens_per_s: least,
            max_tokens_per_s: most,
            model_units: None,
        }),
    }
}

fn rate(field: &Field<'_>, least: i128) -> Result<u64, FieldError> {
    Ok(field.whole(least..=RATE_MAX)? as u64)
}
