//! The little of DER that the safe API of the `openssl` crate leaves out: where
//! one certificate ends and the next begins, and the three extensions of a
//! certificate that SPIFFE gives rules for (RFC 5280, 4.2.1).
//!
//! Reads only; every length is checked against what is there.

use super::error::IdentityError;

const SEQUENCE: u8 = 0x30;
const BOOLEAN: u8 = 0x01;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
/// `[3]` of TBSCertificate.
const EXTENSIONS: u8 = 0xa3;
/// `[6] IA5String` of GeneralName.
const URI: u8 = 0x86;

const KEY_USAGE: [u8; 3] = [0x55, 0x1d, 0x0f];
const SUBJECT_ALT_NAME: [u8; 3] = [0x55, 0x1d, 0x11];
const BASIC_CONSTRAINTS: [u8; 3] = [0x55, 0x1d, 0x13];

/// Bits of the first byte of a key usage.
const DIGITAL_SIGNATURE: u8 = 0x80;
const KEY_CERT_SIGN: u8 = 0x04;
const CRL_SIGN: u8 = 0x02;

/// One element: its tag, content, and what follows it.
struct Element<'a> {
    tag: u8,
    content: &'a [u8],
    whole: &'a [u8],
    rest: &'a [u8],
}

/// The element at the front; `None` when there is none, or it is cut short, or
/// of an indefinite or absurd length.
fn first(input: &[u8]) -> Option<Element<'_>> {
    let (&tag, after_tag) = input.split_first()?;
    let (&short, after_length) = after_tag.split_first()?;
    let (length, header) = if short < 0x80 {
        (usize::from(short), 2)
    } else {
        let count = usize::from(short & 0x7f);
        if count == 0 || count > 4 {
            return None;
        }
        let length = after_length
            .get(..count)?
            .iter()
            .fold(0usize, |length, &byte| (length << 8) | usize::from(byte));
        (length, 2 + count)
    };
    let end = header.checked_add(length)?;
    Some(Element {
        tag,
        content: input.get(header..end)?,
        whole: &input[..end],
        rest: &input[end..],
    })
}

/// The content of the element at the front, if its tag is `tag`.
fn expect(input: &[u8], tag: u8) -> Option<&[u8]> {
    first(input)
        .filter(|element| element.tag == tag)
        .map(|element| element.content)
}

/// Splits certificates that lie back to back, as the Workload API sends them.
///
/// # Errors
///
/// When something else lies between or behind them.
pub(super) fn split(mut input: &[u8]) -> Result<Vec<&[u8]>, IdentityError> {
    let mut parts = Vec::new();
    while !input.is_empty() {
        match first(input) {
            Some(element) if element.tag == SEQUENCE => {
                parts.push(element.whole);
                input = element.rest;
            }
            _ => {
                return Err(IdentityError(format!(
                    "certificate {} is cut short or no DER ({} bytes left)",
                    parts.len() + 1,
                    input.len()
                )));
            }
        }
    }
    Ok(parts)
}

/// What a certificate says about its use.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    /// The URIs among the subject's alternative names.
    pub uris: Vec<Vec<u8>>,
    /// The CA flag of the basic constraints.
    pub is_ca: bool,
    /// First byte of the key usage; zero when there is none.
    key_usage: u8,
}

impl Uses {
    pub fn signs_digitally(&self) -> bool {
        self.key_usage & DIGITAL_SIGNATURE != 0
    }

    pub fn signs_certificates(&self) -> bool {
        self.key_usage & KEY_CERT_SIGN != 0
    }

    pub fn signs_crls(&self) -> bool {
        self.key_usage & CRL_SIGN != 0
    }
}

/// Reads the three extensions of a certificate.
///
/// # Errors
///
/// When the certificate is malformed or repeats one of them.
pub(super) fn uses(certificate: &[u8]) -> Result<Uses, IdentityError> {
    let malformed = || IdentityError("certificate with malformed extensions".to_owned());
    let tbs = expect(certificate, SEQUENCE)
        .and_then(|content| expect(content, SEQUENCE))
        .ok_or_else(malformed)?;
    let mut uses = Uses::default();
    let Some(extensions) = find_extensions(tbs).ok_or_else(malformed)? else {
        return Ok(uses);
    };
    let mut seen = Vec::new();
    let mut rest = extensions;
    while !rest.is_empty() {
        let element = first(rest).ok_or_else(malformed)?;
        rest = element.rest;
        let (oid, value) = extension(element.content).ok_or_else(malformed)?;
        if seen.contains(&oid) {
            return Err(IdentityError(
                "certificate with a repeated extension".to_owned(),
            ));
        }
        seen.push(oid);
        read_extension(oid, value, &mut uses).ok_or_else(malformed)?;
    }
    Ok(uses)
}

/// `Some(None)` for a certificate without extensions, `None` for no DER.
fn find_extensions(mut tbs: &[u8]) -> Option<Option<&[u8]>> {
    while !tbs.is_empty() {
        let element = first(tbs)?;
        if element.tag == EXTENSIONS {
            return expect(element.content, SEQUENCE).map(Some);
        }
        tbs = element.rest;
    }
    Some(None)
}

fn extension(content: &[u8]) -> Option<(&[u8], &[u8])> {
    let oid = first(content).filter(|element| element.tag == OID)?;
    let mut value = first(oid.rest)?;
    if value.tag == BOOLEAN {
        // Whether it is critical.
        value = first(value.rest)?;
    }
    (value.tag == OCTET_STRING).then_some((oid.content, value.content))
}

fn read_extension(oid: &[u8], value: &[u8], uses: &mut Uses) -> Option<()> {
    if oid == KEY_USAGE {
        // The first content byte counts the unused bits of the last one.
        let bits = expect(value, BIT_STRING)?;
        uses.key_usage = bits.get(1).copied().unwrap_or_default();
    } else if oid == BASIC_CONSTRAINTS {
        let constraints = expect(value, SEQUENCE)?;
        uses.is_ca = expect(constraints, BOOLEAN).is_some_and(|flag| flag != [0]);
    } else if oid == SUBJECT_ALT_NAME {
        let mut names = expect(value, SEQUENCE)?;
        while !names.is_empty() {
            let name = first(names)?;
            if name.tag == URI {
                uses.uris.push(name.content.to_vec());
            }
            names = name.rest;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_and_refuses_what_is_cut_short() {
        let two = [0x30, 1, 7, 0x30, 0x81, 2, 8, 9];
        assert_eq!(
            split(&two).unwrap(),
            [&[0x30, 1, 7][..], &[0x30, 0x81, 2, 8, 9]]
        );
        assert_eq!(split(&[]).unwrap(), [] as [&[u8]; 0]);
        for bad in [
            &[0x30][..],
            &[0x30, 2, 1],
            &[0x31, 0],
            &[0x30, 0x80, 0, 0],
            &[0x30, 0x85, 0, 0, 0, 0, 0],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
            &[0x30, 0, 0],
        ] {
            assert!(split(bad).is_err(), "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_input_panics(input in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = split(&input);
            let _ = uses(&input);
        }
    }
}
