//! Query parameters of the tables, read into what they ask for.

use std::collections::BTreeMap;

use actix_web::HttpRequest;
use actix_web::http::header::ACCEPT;
use actix_web::web::Query;

use super::form::Form;
use crate::calendar::parse_moment;
use crate::http::error::Fault;
use crate::http::json::FieldError;
use crate::tables::query::{By, Filter};
use crate::tables::segment::Position;

/// Rows of a page unless told.
const ROWS_DEFAULT: usize = 1000;
/// Most rows of a page.
pub(in crate::http) const ROWS_MAX: usize = 10_000;
/// Longest parameter: names are shorter.
pub(in crate::http) const BYTES_MAX: usize = 256;

/// Parameters of sums.
pub(super) const SUMS: &[&str] = &["start", "end", "user", "endpoint", "group_by", "format"];
/// Parameters of totals.
pub(super) const TOTALS: &[&str] = &["user", "endpoint", "format"];
/// Parameters of rows.
pub(super) const ROWS: &[&str] = &[
    "start",
    "end",
    "user",
    "endpoint",
    "limit",
    "page_token",
    "format",
];
/// Parameters of rows with bodies.
pub(super) const BODIES: &[&str] = &["start", "end", "user", "limit", "page_token", "format"];

/// What is asked of a table.
#[derive(Debug)]
pub(super) struct Question {
    /// Of which calls.
    pub filter: Filter,
    /// Summed up by what.
    pub by: Vec<By>,
    /// From which place on.
    pub from: Option<Position>,
    /// Rows at most.
    pub rows_max: usize,
    /// How the answer is written.
    pub form: Form,
}

impl Question {
    /// Reads a request's parameters, of which these are known.
    pub fn read(request: &HttpRequest, known: &[&str]) -> Result<Self, Fault> {
        let accept = request
            .headers()
            .get(ACCEPT)
            .and_then(|value| value.to_str().ok());
        Self::parse(request.query_string(), accept.unwrap_or_default(), known)
            .map_err(Fault::invalid_parameter)
    }

    fn parse(query: &str, accept: &str, known: &[&str]) -> Result<Self, FieldError> {
        let parameters = Query::<BTreeMap<String, String>>::from_query(query)
            .map_err(|error| {
                FieldError::whole(format!("the query parameters cannot be read: {error}"))
            })?
            .into_inner();
        for (name, value) in &parameters {
            if !known.contains(&name.as_str()) {
                let shown: String = name.chars().take(40).collect();
                return Err(FieldError::whole(format!(
                    "query parameter '{shown}' is not known here; known are {}",
                    known.join(", ")
                )));
            }
            if value.len() > BYTES_MAX {
                let why = format!("must be at most {BYTES_MAX} bytes long");
                return Err(FieldError::at(name, why));
            }
        }
        // An empty parameter is one that a form left out.
        let get = |name: &str| {
            parameters
                .get(name)
                .map(String::as_str)
                .filter(|value| !value.is_empty())
        };
        let moment = |name: &str| {
            let wrong = || {
                let why = "must be milliseconds since 1970, YYYY-MM-DD or YYYY-MM-DDTHH:MM:SSZ";
                FieldError::at(name, why)
            };
            get(name)
                .map(|text| parse_moment(text).ok_or_else(wrong))
                .transpose()
        };
        let (start_ms, end_ms) = (moment("start")?.unwrap_or(0), moment("end")?);
        if end_ms.is_some_and(|end_ms| end_ms <= start_ms) {
            return Err(FieldError::at(
                "end",
                "must be after start; it is not included",
            ));
        }
        let filter = Filter {
            start_ms,
            end_ms,
            user: get("user").map(str::to_owned),
            endpoint: get("endpoint").map(str::to_owned),
            endpoint_id: None,
        };
        let from = get("page_token").map(|text| {
            let why = "must be the next_page_token of an earlier page";
            Position::parse(text).ok_or_else(|| FieldError::at("page_token", why))
        });
        let rows_max = get("limit").map(|text| {
            let limit = text.parse().ok();
            let limit = limit.filter(|limit| (1..=ROWS_MAX).contains(limit));
            let why = format!("must be a whole number between 1 and {ROWS_MAX}");
            limit.ok_or_else(|| FieldError::at("limit", why))
        });
        Ok(Question {
            filter,
            by: get("group_by").map_or_else(|| Ok(Vec::new()), by)?,
            from: from.transpose()?,
            rows_max: rows_max.transpose()?.unwrap_or(ROWS_DEFAULT),
            form: form(get("format"), accept)?,
        })
    }
}

/// `user,day`: each once, in the order given.
fn by(text: &str) -> Result<Vec<By>, FieldError> {
    let mut keys = Vec::new();
    for word in text.split(',') {
        let key = By::ALL.into_iter().find(|by| by.word() == word.trim());
        let key = key.filter(|key| !keys.contains(key)).ok_or_else(|| {
            let why = "must be some of user, endpoint, entity and day, each once, with commas between them";
            FieldError::at("group_by", why)
        })?;
        keys.push(key);
    }
    Ok(keys)
}

/// The parameter wins: links have no headers.
fn form(asked: Option<&str>, accept: &str) -> Result<Form, FieldError> {
    match asked {
        Some("json") => Ok(Form::Json),
        Some("csv") => Ok(Form::Csv),
        Some("ndjson") => Ok(Form::Ndjson),
        Some(_) => Err(FieldError::at("format", "must be json, csv or ndjson")),
        None if accept.contains("text/csv") => Ok(Form::Csv),
        None if accept.contains("application/x-ndjson") => Ok(Form::Ndjson),
        None => Ok(Form::Json),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_into_what_they_ask_for() {
        let query = "start=1970-01-02&end=86400005&user=ann%40x&limit=7&page_token=2026-11-26.jsonl%4012&format=";
        let question = Question::parse(query, "text/csv, */*", ROWS).unwrap();
        let filter = Filter {
            start_ms: 86_400_000,
            end_ms: Some(86_400_005),
            user: Some("ann@x".into()),
            ..Filter::default()
        };
        assert_eq!(question.filter, filter);
        assert_eq!((question.rows_max, question.form), (7, Form::Csv));
        assert_eq!(question.from.unwrap().offset, 12);
        let question =
            Question::parse("group_by=day,%20user&format=ndjson", "text/csv", SUMS).unwrap();
        assert_eq!(question.by, [By::Day, By::User]);
        assert_eq!(question.form, Form::Ndjson);
        let question = Question::parse("", "application/json", SUMS).unwrap();
        assert_eq!(
            (question.filter, question.form),
            (Filter::default(), Form::Json)
        );
    }

    #[test]
    fn what_is_wrong_is_told_by_its_name() {
        for (query, says) in [
            ("start=yesterday", "start must be milliseconds since 1970"),
            ("start=5&end=5", "end must be after start"),
            (
                "limit=0",
                "limit must be a whole number between 1 and 10000",
            ),
            ("limit=x", "limit must be"),
            ("page_token=5", "page_token must be the next_page_token"),
            ("format=xml", "format must be json, csv or ndjson"),
            ("strat=5", "'strat' is not known here; known are start, end"),
        ] {
            let error = Question::parse(query, "", ROWS).unwrap_err();
            assert!(error.message.contains(says), "{}", error.message);
        }
        for query in ["group_by=user,user", "group_by=hour", "group_by=,"] {
            let error = Question::parse(query, "", SUMS).unwrap_err();
            assert!(error.message.contains("group_by must be"), "{query}");
        }
        let long = format!("user={}", "x".repeat(BYTES_MAX + 1));
        assert!(Question::parse(&long, "", ROWS).is_err());
    }
}
