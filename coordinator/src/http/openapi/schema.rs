//! The words in which schemas are written here: `object([need("model", text(), "the endpoint's name"), ...])`.
//!
//! A thin layer over utoipa's builders. Knows no field of the API.

use std::ops::RangeInclusive;

use serde_json::Value;
use utoipa::Number;
use utoipa::openapi::schema::{
    AdditionalProperties, AnyOfBuilder, ArrayBuilder, ObjectBuilder, OneOfBuilder, SchemaType, Type,
};
use utoipa::openapi::{Ref, RefOr, Schema};

/// A schema, or the name of one.
pub(super) type Shape = RefOr<Schema>;

/// Any text.
pub(super) fn text() -> Shape {
    plain(Type::String).into()
}

/// Text of so many characters. Where the server counts bytes, longer characters make the bound lower.
pub(super) fn text_of(chars: RangeInclusive<usize>) -> Shape {
    plain(Type::String)
        .min_length(Some(*chars.start()).filter(|least| *least > 0))
        .max_length(Some(*chars.end()))
        .into()
}

/// Text of a form, and at most so many characters.
pub(super) fn formed(pattern: &str, chars_max: usize) -> Shape {
    plain(Type::String)
        .pattern(Some(pattern))
        .max_length(Some(chars_max))
        .into()
}

/// One of these words.
pub(super) fn words<W: AsRef<str>>(words: &[W]) -> Shape {
    let words = words.iter().map(|word| Value::from(word.as_ref()));
    plain(Type::String).enum_values(Some(words)).into()
}

pub(super) fn flag() -> Shape {
    plain(Type::Boolean).into()
}

/// A whole number of a range. Ranges beyond 64 bits cannot be written down; nobody has any.
pub(super) fn whole(range: RangeInclusive<i128>) -> Shape {
    let bound = |bound: i128| match isize::try_from(bound) {
        Ok(number) => Number::Int(number),
        Err(_) => Number::UInt(usize::try_from(bound).unwrap_or(usize::MAX)),
    };
    plain(Type::Integer)
        .minimum(Some(bound(*range.start())))
        .maximum(Some(bound(*range.end())))
        .into()
}

/// A whole number of a range that divides by another.
pub(super) fn multiple(range: RangeInclusive<u32>, of: u32) -> Shape {
    plain(Type::Integer)
        .minimum(Some(*range.start() as usize))
        .maximum(Some(*range.end() as usize))
        .multiple_of(Some(of as usize))
        .into()
}

/// A whole number without an upper bound.
pub(super) fn at_least(least: u32) -> Shape {
    plain(Type::Integer).minimum(Some(least as usize)).into()
}

/// A number of a range.
pub(super) fn number(range: RangeInclusive<f64>) -> Shape {
    plain(Type::Number)
        .minimum(Some(*range.start()))
        .maximum(Some(*range.end()))
        .into()
}

/// A number above `least` and at most `most`.
pub(super) fn number_above(least: f64, most: f64) -> Shape {
    plain(Type::Number)
        .exclusive_minimum(Some(least))
        .maximum(Some(most))
        .into()
}

/// Any number.
pub(super) fn any_number() -> Shape {
    plain(Type::Number).into()
}

/// Anything that JSON can say.
pub(super) fn anything() -> Shape {
    ObjectBuilder::new()
        .schema_type(SchemaType::AnyValue)
        .into()
}

pub(super) fn list(items: Shape) -> Shape {
    ArrayBuilder::new().items(items).into()
}

/// A list that is not empty.
pub(super) fn filled_list(items: Shape) -> Shape {
    ArrayBuilder::new().items(items).min_items(Some(1)).into()
}

/// A list of so many.
pub(super) fn list_of(items: Shape, count: RangeInclusive<usize>) -> Shape {
    ArrayBuilder::new()
        .items(items)
        .min_items(Some(*count.start()).filter(|least| *least > 0))
        .max_items(Some(*count.end()))
        .into()
}

/// An object with any keys, at most so many.
pub(super) fn map(values: Shape, keys_max: Option<usize>) -> Shape {
    plain(Type::Object)
        .additional_properties(Some(AdditionalProperties::RefOr(values)))
        .max_properties(keys_max)
        .into()
}

/// Exactly one of these.
pub(super) fn one_of(shapes: impl IntoIterator<Item = Shape>) -> Shape {
    let shapes = shapes.into_iter();
    RefOr::T(
        shapes
            .fold(OneOfBuilder::new(), |all, shape| all.item(shape))
            .into(),
    )
}

/// One or more of these.
pub(super) fn any_of(shapes: impl IntoIterator<Item = Shape>) -> Shape {
    let shapes = shapes.into_iter();
    RefOr::T(
        shapes
            .fold(AnyOfBuilder::new(), |all, shape| all.item(shape))
            .into(),
    )
}

/// This, or null.
pub(super) fn or_null(shape: Shape) -> Shape {
    any_of([shape, plain(Type::Null).into()])
}

/// The schema of this name among the document's components.
pub(super) fn named(name: &str) -> Shape {
    RefOr::Ref(Ref::from_schema_name(name))
}

/// A field of an object.
pub(super) struct Field {
    name: &'static str,
    shape: Shape,
    required: bool,
}

/// A field that must be there.
pub(super) fn need(name: &'static str, shape: Shape, says: &str) -> Field {
    Field {
        name,
        shape: described(shape, says),
        required: true,
    }
}

/// A field that may be there.
pub(super) fn may(name: &'static str, shape: Shape, says: &str) -> Field {
    Field {
        required: false,
        ..need(name, shape, says)
    }
}

/// An object with these fields. Others may stand in it.
pub(super) fn object(fields: impl IntoIterator<Item = Field>) -> Shape {
    let mut object = plain(Type::Object);
    for field in fields {
        if field.required {
            object = object.required(field.name);
        }
        object = object.property(field.name, field.shape);
    }
    object.into()
}

/// The same with words for people.
pub(super) fn described(shape: Shape, says: &str) -> Shape {
    if says.is_empty() {
        return shape;
    }
    match shape {
        RefOr::Ref(mut reference) => {
            reference.description = says.to_owned();
            RefOr::Ref(reference)
        }
        RefOr::T(schema) => {
            let says = Some(says.to_owned());
            RefOr::T(match schema {
                Schema::Object(mut object) => {
                    object.description = says;
                    Schema::Object(object)
                }
                Schema::Array(mut array) => {
                    array.description = says;
                    Schema::Array(array)
                }
                Schema::OneOf(mut one) => {
                    one.description = says;
                    Schema::OneOf(one)
                }
                Schema::AnyOf(mut any) => {
                    any.description = says;
                    Schema::AnyOf(any)
                }
                other => other,
            })
        }
    }
}

fn plain(kind: Type) -> ObjectBuilder {
    ObjectBuilder::new().schema_type(kind)
}
