//! OpenAI's embeddings: the request as checked types, the answer as JSON.
//!
//! Pure. What an embedding is, the engine says: the mean of the prompt's last hidden states, not normalised.

use common::request::{Generate, Stop};
use serde::Serialize;
use serde::ser::Serializer;

use super::error::Fault;
use super::json::{FieldError, Fields, Object};
use super::openai::{extra_params, prompts, truncates};
use super::parts::{Choice, Usage};
use super::sampling::check_size;

/// A checked request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct EmbeddingRequest {
    /// One embedding each.
    pub prompts: Vec<Generate>,
    /// Vectors as base64 of little-endian f32, as OpenAI's Python client asks for.
    pub base64: bool,
    /// How long the client wants them.
    pub dimensions: Option<u32>,
}

/// Reads the body of a request for embeddings.
pub(super) fn request(body: &Object) -> Result<EmbeddingRequest, FieldError> {
    let extra = extra_params(body)?;
    let fields = Fields::of("", body).or("extra_params", &extra);
    let base64 = match fields.get("encoding_format") {
        None => false,
        Some(field) => match field.text()? {
            "float" => false,
            "base64" => true,
            _ => return Err(field.wrong("\"float\" or \"base64\"")),
        },
    };
    let dimensions = match fields.get("dimensions") {
        None => None,
        Some(field) => Some(field.whole(1..=i128::from(u32::MAX))? as u32),
    };
    let truncate_prompt = truncates(&fields)?;
    let field = fields.need("input")?;
    let texts = prompts(&field)?;
    check_size(texts.len(), texts.len(), &field.path)?;
    let embedding = |prompt| Generate {
        stop: Stop {
            tokens_max: Some(0),
            ..Stop::default()
        },
        truncate_prompt,
        embedding: true,
        ..Generate::new(prompt)
    };
    Ok(EmbeddingRequest {
        prompts: texts.into_iter().map(embedding).collect(),
        base64,
        dimensions,
    })
}

/// The answer.
#[derive(Serialize)]
pub(super) struct Embeddings<'a> {
    object: &'static str,
    model: &'a str,
    data: Vec<Embedding<'a>>,
    usage: EmbeddingUsage,
}

impl<'a> Embeddings<'a> {
    /// One embedding per choice.
    pub fn of(model: &'a str, choices: &'a [Choice], base64: bool, usage: Usage) -> Self {
        let embedding = |(index, choice): (usize, &'a Choice)| Embedding {
            object: "embedding",
            index,
            embedding: match base64 {
                true => Vector::Base64(&choice.embedding),
                false => Vector::Floats(&choice.embedding),
            },
        };
        Embeddings {
            object: "list",
            model,
            data: choices.iter().enumerate().map(embedding).collect(),
            usage: EmbeddingUsage {
                prompt_tokens: usage.prompt_tokens,
                total_tokens: usage.prompt_tokens,
            },
        }
    }

    /// Whether there is a vector for every input, of the length that was asked for: a mean of hidden states is not made
    /// to be cut shorter.
    pub fn check(&self, dimensions: Option<u32>) -> Result<(), Fault> {
        for data in &self.data {
            let (Vector::Floats(values) | Vector::Base64(values)) = data.embedding;
            if values.is_empty() {
                return Err(Fault::internal("the cluster gave no embedding"));
            }
            if let Some(asked) = dimensions.filter(|asked| *asked as usize != values.len()) {
                let why = format!(
                    "is {asked}, but this model's embeddings have {} numbers and cannot be shortened: leave it out",
                    values.len()
                );
                return Err(Fault::bad_request(FieldError::at("dimensions", why)));
            }
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Embedding<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

#[derive(Clone, Copy)]
enum Vector<'a> {
    Floats(&'a [f32]),
    Base64(&'a [f32]),
}

impl Serialize for Vector<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Vector::Floats(values) => values.serialize(serializer),
            Vector::Base64(values) => serializer.serialize_str(&base64(values)),
        }
    }
}

#[derive(Serialize)]
struct EmbeddingUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}

/// The values' little-endian bytes in base64, padded.
fn base64(values: &[f32]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            text.push(if digit <= three.len() {
                char::from(DIGITS[(bits >> (18 - 6 * digit)) as usize & 63])
            } else {
                '='
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use common::request::Prompt;
    use serde_json::{Value, json};

    use super::*;

    fn parse(body: &Value) -> Result<EmbeddingRequest, FieldError> {
        request(body.as_object().unwrap())
    }

    #[test]
    fn inputs_come_in_four_forms_and_ask_for_nothing_but_embeddings() {
        let of = |input: Value| parse(&json!({"input": input})).unwrap().prompts;
        let prompts: Vec<Prompt> = [
            json!("a"),
            json!([1, 2]),
            json!(["b", "c"]),
            json!([[3], [4]]),
        ]
        .into_iter()
        .flat_map(of)
        .map(|generate| generate.prompt)
        .collect();
        let text = |text: &str| Prompt::Text(text.into());
        let ids = |ids: &[u32]| Prompt::Tokens(ids.to_vec());
        let expected = [
            text("a"),
            ids(&[1, 2]),
            text("b"),
            text("c"),
            ids(&[3]),
            ids(&[4]),
        ];
        assert_eq!(prompts, expected);
        let generate = &of(json!("a"))[0];
        assert!(generate.embedding && !generate.truncate_prompt);
        assert_eq!(
            (generate.stop.tokens_max, generate.candidates),
            (Some(0), 1)
        );
    }

    #[test]
    fn every_mistake_is_told_with_its_field() {
        let table = [
            (json!({}), "input is missing"),
            (json!({"input": 5}), "input must be a string"),
            (json!({"input": []}), "input has no prompt"),
            (json!({"input": vec!["a"; 257]}), "input has 257 prompts"),
            (
                json!({"input": "a", "encoding_format": "int8"}),
                "encoding_format must be \"float\" or",
            ),
            (
                json!({"input": "a", "dimensions": 0}),
                "dimensions must be a whole number",
            ),
            (
                json!({"input": "a", "error_behavior": "ignore"}),
                "error_behavior must be",
            ),
        ];
        for (body, says) in table {
            let error = parse(&body).unwrap_err();
            assert!(error.message.starts_with(says), "{}", error.message);
        }
    }

    #[test]
    fn vectors_are_floats_or_base64_of_their_bytes() {
        let choice = |values: &[f32]| Choice {
            embedding: values.to_vec(),
            ..Choice::default()
        };
        let choices = [choice(&[0.5, -1.25]), choice(&[1.0, 0.1])];
        let usage = Usage {
            prompt_tokens: 3,
            completion_tokens: 0,
        };
        let shown =
            |base64| serde_json::to_string(&Embeddings::of("e", &choices, base64, usage)).unwrap();
        assert_eq!(
            shown(false),
            r#"{"object":"list","model":"e","data":[{"object":"embedding","index":0,"embedding":[0.5,-1.25]},{"object":"embedding","index":1,"embedding":[1.0,0.1]}],"usage":{"prompt_tokens":3,"total_tokens":3}}"#
        );
        // By Python: base64.b64encode(struct.pack("<2f", ...)).
        assert!(
            shown(true).contains(r#""embedding":"AAAAPwAAoL8=""#),
            "{}",
            shown(true)
        );
        assert!(
            shown(true).contains(r#""embedding":"AACAP83MzD0=""#),
            "{}",
            shown(true)
        );
        assert_eq!(
            [base64(&[]), base64(&[1.0]), base64(&[0.0; 3])],
            ["", "AACAPw==", "AAAAAAAAAAAAAAAA"]
        );
    }

    #[test]
    fn other_dimensions_than_the_models_are_refused() {
        let choices = [Choice {
            embedding: vec![0.5; 4],
            ..Choice::default()
        }];
        let reply = Embeddings::of("e", &choices, false, Usage::default());
        assert!(reply.check(None).is_ok() && reply.check(Some(4)).is_ok());
        let fault = reply.check(Some(3)).unwrap_err();
        assert_eq!(
            (fault.code, fault.param.as_deref()),
            ("BAD_REQUEST", Some("dimensions"))
        );
        assert!(fault.message.contains("have 4 numbers"), "{fault}");
        let none = [Choice::default()];
        let reply = Embeddings::of("e", &none, false, Usage::default());
        assert_eq!(reply.check(None).unwrap_err().code, "INTERNAL_ERROR");
    }
}
