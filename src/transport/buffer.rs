//! The bytes of one direction of a connection.

/// Room for one TLS record.
const SIZE: usize = 16 * 1024;

/// Bytes on their way: filled at the back, taken from the front. Holds memory
/// only while there are any, since most connections are idle.
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    pub(super) fn new() -> Self {
        Self {
            bytes: Box::default(),
            start: 0,
            end: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn has_room(&self) -> bool {
        self.end < SIZE
    }

    pub(super) fn data(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Where the next bytes can be put; empty when there is no room.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.bytes.is_empty() {
            self.bytes = vec![0; SIZE].into_boxed_slice();
        }
        &mut self.bytes[self.end..]
    }

    /// `count` bytes were put into the room; returns them.
    pub(super) fn filled(&mut self, count: usize) -> &[u8] {
        let from = self.end;
        self.end = (self.end + count).min(self.bytes.len());
        &self.bytes[from..self.end]
    }

    /// `count` bytes of the data have gone.
    pub(super) fn taken(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.is_empty() {
            self.clear();
        }
    }

    pub(super) fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
    }

    /// Gives the memory back if there is nothing in it.
    pub(super) fn release(&mut self) {
        if self.is_empty() {
            *self = Self::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_order_and_holds_nothing_when_empty() {
        let mut buffer = Buffer::new();
        assert!(buffer.has_room() && buffer.data().is_empty());
        buffer.room()[..5].copy_from_slice(b"abcde");
        assert_eq!(buffer.filled(5), b"abcde");
        buffer.taken(2);
        buffer.release();
        buffer.room()[..1].copy_from_slice(b"f");
        assert_eq!(buffer.filled(1), b"f");
        assert_eq!(buffer.data(), b"cdef");
        let rest = buffer.room().len();
        buffer.filled(rest);
        assert!(!buffer.has_room() && buffer.room().is_empty());
        buffer.taken(SIZE);
        assert!(buffer.is_empty() && buffer.has_room());
        buffer.release();
        assert!(buffer.bytes.is_empty() && buffer.data().is_empty());
    }
}
