//! Bounds in the document are the server's: what stands at a bound is taken, what is beyond it is refused.

use std::sync::Arc;

use actix_web::http::Method;
use actix_web::test::{TestRequest, call_service, init_service, read_body};
use actix_web::web::Data;
use serde_json::{Map, Value, json};

use super::{document, operations};
use crate::http::app;
use crate::http::tests::fake::{FakeGateway, endpoint_view};
use crate::http::tests::{authorized, state};

/// A value at or beyond a bound, and where in the body it stands.
#[derive(Debug)]
struct Probe {
    place: Vec<String>,
    value: Value,
    allowed: bool,
}

/// Says which probes belong to a schema.
struct Prober<'a> {
    document: &'a Value,
    place: Vec<String>,
    probes: Vec<Probe>,
}

impl<'a> Prober<'a> {
    fn resolve(&self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(to) => self.document.pointer(&to[1..]).unwrap(),
            None => schema,
        }
    }

    fn add(&mut self, value: Value, allowed: bool) {
        let together = |field: &String| TOGETHER.contains(&field.as_str());
        if self.place.iter().any(together) {
            return;
        }
        let place = self.place.clone();
        self.probes.push(Probe {
            place,
            value,
            allowed,
        });
    }

    /// Walks along an example, since lists of objects need one to stand beside.
    fn walk(&mut self, schema: &'a Value, example: Option<&Value>) {
        let schema = self.resolve(schema);
        if let Some(arms) = schema["anyOf"].as_array() {
            // What one of several shapes refuses another may take.
            let before = self.probes.len();
            arms.iter().for_each(|arm| self.walk(arm, example));
            let mut i = 0;
            self.probes.retain(|probe| {
                i += 1;
                i <= before || probe.allowed
            });
            return;
        }
        match schema["type"].as_str() {
            Some("object") => {
                for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                    self.place.push(name.clone());
                    self.walk(property, example.and_then(|example| example.get(name)));
                    self.place.pop();
                }
                if let Some(most) = schema["maxProperties"].as_u64() {
                    let object = |count: u64| {
                        let value = smallest(&schema["additionalProperties"]);
                        (0..count)
                            .map(|i| (i.to_string(), value.clone()))
                            .collect::<Map<_, _>>()
                    };
                    self.add(object(most).into(), true);
                    self.add(object(most + 1).into(), false);
                }
            }
            Some("array") => self.list(schema, example),
            Some("integer" | "number") => self.number(schema),
            Some("string") => self.text(schema),
            _ => {}
        }
    }

    fn list(&mut self, schema: &'a Value, example: Option<&Value>) {
        let items = self.resolve(&schema["items"]);
        // A list of another of the allowed shapes is no place for these items.
        let first = example.and_then(|example| example.get(0));
        if let Some(example) = first.filter(|first| is_of(items, first)) {
            self.place.push("0".into());
            self.walk(items, Some(example));
            self.place.pop();
        }
        if !matches!(items["type"].as_str(), Some("string" | "integer")) {
            return;
        }
        let list = |count: u64| vec![smallest(items); count as usize];
        if let Some(most) = schema["maxItems"].as_u64() {
            self.add(list(most).into(), true);
            self.add(list(most + 1).into(), false);
        }
        if let Some(least @ 1..) = schema["minItems"].as_u64() {
            self.add(list(least - 1).into(), false);
        }
    }

    fn number(&mut self, schema: &Value) {
        let bounds = [
            ("minimum", -1, true),
            ("maximum", 1, true),
            ("exclusiveMinimum", 0, false),
        ];
        for (key, beyond, allowed) in bounds {
            let bound = &schema[key];
            if bound.is_null() {
                continue;
            }
            self.add(bound.clone(), allowed);
            let past = match bound.as_i64().and_then(|bound| bound.checked_add(beyond)) {
                Some(past) => json!(past),
                // Far enough to be another float.
                None => json!(bound.as_f64().unwrap() + 4096.0 * beyond as f64),
            };
            if past != *bound {
                self.add(past, false);
            }
        }
    }

    fn text(&mut self, schema: &Value) {
        if let Some(words) = schema["enum"].as_array() {
            words.iter().for_each(|word| self.add(word.clone(), true));
            self.add("no such word".into(), false);
        }
        let most = schema["maxLength"].as_u64();
        if let Some(most) =
            most.filter(|_| schema["pattern"].is_null() || schema["pattern"] == NAME)
        {
            self.add("a".repeat(most as usize).into(), true);
            self.add("a".repeat(most as usize + 1).into(), false);
        }
        if let Some(least @ 1..) = schema["minLength"].as_u64() {
            self.add("a".repeat(least as usize - 1).into(), false);
        }
    }
}

/// Fields that are bounded together with others: shares sum to 100, the least is not above the most, one size excludes
/// another, a route names an entity beside it, a model is an endpoint that is there or not (404), what stands beside a
/// prompt counts where `params` does not say it, a schema and a tool's turn need more than their kind.
const TOGETHER: [&str; 12] = [
    "dataframe_records",
    "model",
    "response_format",
    "role",
    "served_entity_name",
    "served_model_name",
    "traffic_percentage",
    "min_provisioned_concurrency",
    "max_provisioned_concurrency",
    "min_provisioned_throughput",
    "max_provisioned_throughput",
    "provisioned_model_units",
];

/// The pattern of names, of which any letter is one.
const NAME: &str = "^[A-Za-z0-9][A-Za-z0-9_-]*$";

fn is_of(schema: &Value, value: &Value) -> bool {
    match schema["type"].as_str() {
        Some("string") => value.is_string(),
        Some("integer" | "number") => value.is_number(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => true,
    }
}

fn smallest(schema: &Value) -> Value {
    match schema["type"].as_str() {
        Some("string") => "a".into(),
        Some("integer") => schema["minimum"].clone(),
        _ => json!(1),
    }
}

/// The body with a value at a place.
fn with(body: &Value, probe: &Probe) -> Value {
    let mut body = body.clone();
    let mut at = &mut body;
    for key in &probe.place {
        at = match at {
            Value::Array(values) => &mut values[key.parse::<usize>().unwrap()],
            other => &mut other[key.as_str()],
        };
    }
    *at = probe.value.clone();
    body
}

#[actix_web::test]
async fn what_is_at_a_bound_is_taken_and_what_is_beyond_is_refused() {
    let document = document();
    let gateway = FakeGateway::default();
    gateway
        .endpoints
        .lock()
        .unwrap()
        .push(endpoint_view("hello"));
    let mut state = state(Arc::new(gateway));
    // The longest texts are far beyond what other tests send.
    state.limits.body_bytes_max = 16 << 20;
    let server = init_service(app(Data::new(state))).await;
    // Whether it takes a body; what the cluster makes of it is another matter.
    let takes = async |path: &str, method: &str, body: &Value| {
        let path = path.replace("{name}", "hello").replace("{id}", "hello");
        let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
        let request = TestRequest::with_uri(&path)
            .method(method)
            .set_payload(body.to_string());
        let response = call_service(&server, authorized(request).to_request()).await;
        let refused = matches!(response.status().as_u16(), 400 | 413);
        let text = read_body(response).await;
        if refused {
            return Err(String::from_utf8_lossy(&text).into_owned());
        }
        Ok(())
    };
    let mut count = 0;
    for (path, method, operation) in operations(&document) {
        let content = &operation["requestBody"]["content"]["application/json"];
        let schema = &content["schema"];
        if schema.is_null() {
            continue;
        }
        let arms = match schema["oneOf"].as_array() {
            Some(arms) => arms.iter().collect(),
            None => vec![schema],
        };
        let examples: Vec<&Value> = content["examples"]
            .as_object()
            .unwrap()
            .values()
            .map(|example| &example["value"])
            .collect();
        for arm in arms {
            let mut prober = Prober {
                document: &document,
                place: Vec::new(),
                probes: Vec::new(),
            };
            let arm = prober.resolve(arm);
            let required = arm["required"].as_array().cloned().unwrap_or_default();
            let has = |example: &&&Value| {
                required
                    .iter()
                    .all(|key| example.get(key.as_str().unwrap()).is_some())
            };
            let examples: Vec<&Value> = examples.iter().filter(has).copied().collect();
            assert!(
                !examples.is_empty(),
                "{method} {path} has no example of {arm}"
            );
            for example in &examples {
                takes(path, method, example)
                    .await
                    .unwrap_or_else(|e| panic!("{example}: {e}"));
            }
            for example in &examples {
                prober.walk(arm, Some(example));
            }
            for probe in prober.probes {
                let mut answers = Vec::new();
                for example in &examples {
                    // A list that another example has need not be in this one.
                    let stands = probe.place.iter().try_fold(*example, |at, key| match at {
                        Value::Array(values) => values.get(key.parse::<usize>().ok()?),
                        Value::Object(fields) => Some(fields.get(key).unwrap_or(&Value::Null)),
                        Value::Null if key != "0" => Some(at),
                        _ => None,
                    });
                    if stands.is_some() {
                        let body = with(example, &probe);
                        answers.push(takes(path, method, &body).await);
                    }
                }
                // A shape that no example has.
                if answers.is_empty() {
                    continue;
                }
                count += 1;
                let taken = answers.iter().any(Result::is_ok);
                let shown: String = probe.value.to_string().chars().take(60).collect();
                assert_eq!(
                    taken,
                    probe.allowed,
                    "{method} {path}: {} = {shown}: the server says {answers:?}",
                    probe.place.join(".")
                );
            }
        }
    }
    assert!(count > 300, "only {count} bounds were tried");
}
