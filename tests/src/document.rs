//! The API's OpenAPI document as a test reads it: operations with their examples, and whether an answer is as promised.

use jsonschema::Validator;
use reqwest::Method;
use serde_json::{Map, Value, json};

use crate::client::{Client, Reply};

/// A served document.
pub struct Document(Value);

/// One operation of it.
#[derive(Debug)]
pub struct Operation<'a> {
    /// The path as the document writes it.
    pub template: &'a str,
    /// The path with the parameters' examples in it.
    pub path: String,
    /// How it is asked.
    pub method: Method,
    /// Its description.
    pub told: &'a Value,
}

impl Document {
    /// Fetches the document; no token is sent.
    pub async fn fetch(client: &Client) -> Document {
        let reply = client.with_token(None).get("/api/2.0/openapi.json").await;
        Document(reply.ok())
    }

    /// Whether it is an OpenAPI 3.1 document, as the schema says that the OpenAPI Initiative publishes (`spec.openapis.org`, Apache-2.0), and all its
    /// schemas are schemas.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check_form(&self) -> Result<(), String> {
        let published = include_str!("../openapi/oas-3.1.schema.json");
        let published: Value = serde_json::from_str(published).map_err(|e| e.to_string())?;
        let errors: Vec<String> = validator(&published)?
            .iter_errors(&self.0)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        if !errors.is_empty() {
            return Err(errors.join("\n"));
        }
        for (name, schema) in self.0["components"]["schemas"]
            .as_object()
            .into_iter()
            .flatten()
        {
            jsonschema::meta::validate(schema).map_err(|e| format!("{name}: {e}"))?;
        }
        Ok(())
    }

    /// All operations, in the document's order.
    pub fn operations(&self) -> Vec<Operation<'_>> {
        let paths = self.0["paths"].as_object().expect("a document has paths");
        let mut operations = Vec::new();
        for (template, item) in paths {
            for (method, told) in item.as_object().expect("a path has operations") {
                operations.push(Operation {
                    template,
                    path: path_of(template, told),
                    method: method.to_uppercase().parse().expect("a method"),
                    told,
                });
            }
        }
        operations
    }

    /// Whether the body of a request is one that the operation says it takes.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check_body(&self, operation: &Operation<'_>, body: &Value) -> Result<(), String> {
        let schema = &operation.told["requestBody"]["content"]["application/json"]["schema"];
        self.check(schema, body, false)
    }

    /// Whether an answer is as the operation promises it: its status, its type, and its shape, in which no field stands
    /// that is not told.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check_reply(&self, operation: &Operation<'_>, reply: &Reply) -> Result<(), String> {
        let status = reply.status.to_string();
        let promised = self.resolve(&operation.told["responses"][&status]);
        if promised.is_null() {
            return Err(format!("status {status} is not promised: {}", reply.text));
        }
        let kind = reply.content_type.as_deref().unwrap_or("none");
        let kind = kind.split(';').next().unwrap_or(kind);
        let content = &promised["content"][kind];
        if content.is_null() {
            return Err(format!("content type {kind} is not promised"));
        }
        if !promised["headers"]["served-model-name"].is_null() && reply.served_model_name.is_none()
        {
            return Err("the header served-model-name is promised and missing".into());
        }
        match kind {
            "application/json" => self.check(&content["schema"], &reply.json(), true),
            "text/event-stream" => self.check_events(&reply.text),
            _ => Ok(()),
        }
    }

    fn check_events(&self, text: &str) -> Result<(), String> {
        let chunks = [named("CompletionChunk"), named("ChatChunk")];
        let schema = json!({"anyOf": chunks});
        let mut events = 0;
        for line in text.lines().filter(|line| !line.is_empty()) {
            match line.strip_prefix("data: ") {
                Some("[DONE]") => {
                    return if events > 0 {
                        Ok(())
                    } else {
                        Err("no event".into())
                    };
                }
                Some(event) => {
                    let event =
                        serde_json::from_str(event).map_err(|e| format!("{e} in {line}"))?;
                    self.check(&schema, &event, true)?;
                    events += 1;
                }
                None => return Err(format!("not a line of events: {line}")),
            }
        }
        Err(format!("the events end without [DONE]: {text}"))
    }

    fn resolve<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value["$ref"].as_str() {
            Some(to) => self.0.pointer(&to[1..]).unwrap_or(&Value::Null),
            None => value,
        }
    }

    fn check(&self, schema: &Value, value: &Value, strict: bool) -> Result<(), String> {
        let mut root = json!({"components": self.0["components"], "allOf": [schema]});
        if strict {
            close(&mut root);
        }
        let validator = validator(&root)?;
        let errors: Vec<String> = validator
            .iter_errors(value)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        if errors.is_empty() {
            return Ok(());
        }
        Err(format!("{}\nin {value:#}", errors.join("\n")))
    }
}

fn validator(schema: &Value) -> Result<Validator, String> {
    jsonschema::draft202012::new(schema).map_err(|e| format!("the document's schema is none: {e}"))
}

/// The schema of this name.
fn named(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// Objects take no field that is not told, unless they say which others they take.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            if object.get("type") == Some(&json!("object")) {
                object.entry("additionalProperties").or_insert(json!(false));
            }
            object.values_mut().for_each(close);
        }
        Value::Array(values) => values.iter_mut().for_each(close),
        _ => {}
    }
}

/// A path with its parameters' examples in it.
fn path_of(template: &str, told: &Value) -> String {
    let parameters = told["parameters"].as_array().into_iter().flatten();
    let in_path = parameters.filter(|parameter| parameter["in"] == "path");
    in_path.fold(template.to_owned(), |path, parameter| {
        let name = parameter["name"].as_str().expect("a parameter has a name");
        let example = parameter["example"].as_str();
        let example = example.unwrap_or_else(|| panic!("{template}: {name} has no example"));
        path.replace(&format!("{{{name}}}"), example)
    })
}

impl Operation<'_> {
    /// The examples of its body by name; `Null` when it has none.
    pub fn examples(&self) -> Vec<(String, Value)> {
        let content = &self.told["requestBody"]["content"]["application/json"];
        let examples: Option<&Map<String, Value>> = content["examples"].as_object();
        match examples {
            None => vec![("none".into(), Value::Null)],
            Some(examples) => examples
                .iter()
                .map(|(name, example)| (name.clone(), example["value"].clone()))
                .collect(),
        }
    }

    /// What generated clients call it.
    pub fn id(&self) -> &str {
        self.told["operationId"].as_str().unwrap_or_default()
    }

    /// Whether its answer can be good: some calls are there to say that they are not built.
    pub fn is_built(&self) -> bool {
        self.told["responses"]["501"].is_null()
    }
}
