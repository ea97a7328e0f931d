//! The canonical JSON form of the messages: bytes as base64, 64-bit numbers as strings, names in
//! lowerCamelCase. Reading also takes plain numbers and the names of the .proto files, and refuses
//! fields that the message doesn't have.

use std::sync::LazyLock;

use prost::{Message, Name};
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions,
};

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(crate::DESCRIPTORS)
        .expect("the descriptors were made by this crate's build script")
});

/// Why a text is not the JSON form of a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct JsonError {
    /// The line where reading stopped, counted from 1.
    pub line: usize,
    /// The column in that line.
    pub column: usize,
    /// What is wrong there.
    pub message: String,
}

impl From<serde_json::Error> for JsonError {
    fn from(error: serde_json::Error) -> Self {
        let text = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let message = text.strip_suffix(&place).unwrap_or(&text).to_owned();
        Self { line: error.line(), column: error.column(), message }
    }
}

/// The message that `text` is the JSON form of.
///
/// # Errors
/// Where the text is not JSON, has a field that the message lacks, or a value of the wrong kind.
pub fn from_json<M: Message + Name + Default>(text: &[u8]) -> Result<M, JsonError> {
    let mut reader = serde_json::Deserializer::from_slice(text);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(descriptor::<M>(), &mut reader, &options)?;
    reader.end()?;
    Ok(message.transcode_to().expect("the message has the type of its descriptor"))
}

/// The JSON form of `message`, on one line; fields that have their default value are left out.
pub fn to_json<M: Message + Name>(message: &M) -> String {
    let mut dynamic = DynamicMessage::new(descriptor::<M>());
    dynamic.transcode_from(message).expect("the message has the type of its descriptor");
    let mut text = Vec::new();
    dynamic
        .serialize_with_options(&mut serde_json::Serializer::new(&mut text), &SerializeOptions::new())
        .expect("writing to memory does not fail");
    String::from_utf8(text).expect("JSON is written as UTF-8")
}

fn descriptor<M: Name>() -> MessageDescriptor {
    POOL.get_message_by_name(&M::full_name()).expect("every message of this crate has a descriptor")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::{BuildEvent, BuildRequest};

    #[test]
    fn both_spellings_and_both_kinds_of_number() {
        let texts = [
            r#"{"commandArgs": ["a"], "constraints": {"minMemory": "7"}}"#,
            r#"{"command_args": ["a"], "constraints": {"min_memory": 7}}"#,
        ];
        for text in texts {
            let request: BuildRequest = from_json(text.as_bytes()).unwrap();
            assert_eq!(request.command_args, ["a"]);
            assert_eq!(request.constraints.unwrap().min_memory, 7);
        }
    }

    #[test]
    fn the_canonical_form() {
        let text = r#"{"commandArgs":["a"],"environmentVars":[{"key":"K","value":"/w=="}]}"#;
        let request: BuildRequest = from_json(text.as_bytes()).unwrap();
        assert_eq!(request.environment_vars[0].value, [0xff]);
        assert_eq!(to_json(&request), text);
    }

    #[test]
    fn refusals_say_where() {
        let cases = [
            ("", 1, "EOF"),
            ("{\n  \"outputs\": 7}", 2, "invalid type"),
            ("{\n\n  \"colour\": 1}", 3, "colour"),
            ("{} {}", 1, "trailing characters"),
            ("{\"environmentVars\":[{\"key\":\"K\",\n\"value\":\"!\"}]}", 2, "base64"),
            ("{\"constraints\":{\"minMemory\":-1}}", 1, "out of range"),
        ];
        for (text, line, part) in cases {
            let error = from_json::<BuildRequest>(text.as_bytes()).unwrap_err();
            assert_eq!(error.line, line, "{text}: {error}");
            assert!(error.to_string().contains(part), "{text}: {error}");
            assert!(!error.message.contains(" at line "), "{error}");
        }
        assert!(from_json::<BuildEvent>(b"\xff").is_err());
    }
}
